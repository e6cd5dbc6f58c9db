"""How far a run is: a bar where somebody looks, plain lines where a file does."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from . import interrupt

Item = TypeVar("Item")

LINE_EVERY_S = 10.0
"""At most one plain line in so many seconds, so that a log stays readable."""


def track(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    """Yield the items and show on standard error how many of `total` are done.

    Raises:
        KeyboardInterrupt: Ctrl-C, which a library may have kept to itself meanwhile.
    """
    items = _interruptible(items)
    if sys.stderr.isatty():
        yield from _bar(items, total, title)
        return
    say(f"{title}: {total}")
    shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - shown >= LINE_EVERY_S and done < total:
            shown = time.monotonic()
            say(f"{title}: {done} of {total}")
    say(f"{title}: done")


def say(text: str) -> None:
    """A line for whoever waits; what a program reads goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def _interruptible(items: Iterable[Item]) -> Iterator[Item]:
    for item in items:
        interrupt.check()
        yield item


def _bar(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    from tqdm import tqdm

    bar: Any = tqdm(items, total=total, desc=title, leave=True)
    yield from bar
