"""Ctrl-C, also where a library makes another error of it.

Python raises KeyboardInterrupt wherever its code is at the moment. If that is a call from compiled
code, as from safetensors while it hands over a tensor, what comes out is a ValueError about shapes.
So it is remembered that there was one.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_seen = False


@contextmanager
def remembered() -> Iterator[None]:
    """Whatever leaves the block after a Ctrl-C leaves it as KeyboardInterrupt."""
    global _seen
    _seen = False
    if threading.current_thread() is not threading.main_thread():  # never gets signals
        yield
        return
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except Exception:
        check()
        raise
    finally:
        _seen = False
        signal.signal(signal.SIGINT, before)


def check() -> None:
    """Raise KeyboardInterrupt again, if there was one: for whoever handles any exception."""
    if _seen:
        raise KeyboardInterrupt


def _interrupt(_number: int, _frame: Any) -> None:
    global _seen
    _seen = True
    raise KeyboardInterrupt
