"""Upstream's server and ours must answer the same: hundreds of requests, sent to both."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from .differential_client import Client
from .differential_compare import canonical, differences
from .differential_guarded import OPTIONS, guarded_shapes
from .differential_prompts import prompt_shapes
from .differential_shapes import (
    CHAT,
    Shape,
    chat_body,
    encode,
    parameter_shapes,
    request,
)
from .differential_wire import wire_shapes

if TYPE_CHECKING:
    from .conftest import Server

pytestmark = pytest.mark.server

BASE = ("--enforce-eager", "--max-model-len", "2048")
PAIRS: dict[str, tuple[str, ...]] = {
    "plain": (*BASE, "--served-model-name", "demo"),
    "guarded": (*BASE, *OPTIONS),
}
SHAPES: dict[str, list[Shape]] = {
    "plain": [*parameter_shapes(), *prompt_shapes(), *wire_shapes()],
    "guarded": guarded_shapes(),
}

OURS = ("--plugins", "scalellm", *shlex.split(os.environ.get("SCALELLM_TEST_OPTIONS", "")))
"""`make test-modes` switches features off by the variable, or has several API servers."""

PATIENCE = 3
"""How many shapes may time out before the rest fails at once: else a hanging server hangs CI."""

DELIBERATE: tuple[tuple[str, str, str], ...] = (
    (
        "*",
        "*.headers.server-timing: upstream has no such key,*",
        "the fast lane tells in this header where a request's time went",
    ),
)
"""Differences that we want: (pattern of shape ids, pattern of differences, why)."""

_REQUESTS = re.compile(r'^scalellm:requests_total\{[^}]*lane="(\w+)"[^}]*\} (\S+)$', re.MULTILINE)
"""The counter that tells which lane of our server served a request."""


@dataclass
class Pair:
    """Clients of upstream's server and of ours, and two threads to use them at once.

    `lanes` holds the lane that served each shape sent so far: "fast", "full", or what else our
    server's counter names; it stays empty as long as the server has no such counter.
    """

    upstream: Client
    ours: Client
    threads: ThreadPoolExecutor
    lanes: dict[str, str] = field(default_factory=dict)
    sent: set[str] = field(default_factory=set)
    _served: Counter[str] = field(default_factory=Counter)
    _silences: int = 0

    def send(self, shape: Shape) -> tuple[dict[str, Any], dict[str, Any]]:
        """The canonical answers of upstream and of ours.

        Both get every shape, once each, so that their prefix caches stay equal.
        """
        if self._silences >= PATIENCE:
            pytest.fail(f"a server left {PATIENCE} shapes unanswered: not asked again")
        try:
            answers = list(self.threads.map(shape.send, (self.upstream, self.ours)))
        except TimeoutError:
            self._silences += 1
            raise
        upstream, ours = (canonical(answer) for answer in answers)
        self.sent.add(shape.id)
        if self._served:
            self.lanes[shape.id] = self._lane()
        return upstream, ours

    def learn_whether_lanes_are_counted(self) -> None:
        """Send both a first request; without a counter after it, none is looked for again."""
        first = request("first", CHAT, chat_body())
        list(self.threads.map(first.send, (self.upstream, self.ours)))
        self._served = self._count()

    def _lane(self) -> str:
        served = self._count()
        new = served - self._served
        self._served = served
        return " ".join(f"{lane}:{n}" if n > 1 else lane for lane, n in sorted(new.items()))

    def _count(self) -> Counter[str]:
        response = self.ours.request(encode("/metrics", method="GET"), "GET").responses[0]
        counts: Counter[str] = Counter()
        for lane, count in _REQUESTS.findall(response.body.decode()):
            counts[lane] += int(float(count))
        return counts


class Pairs:
    """One pair of servers at a time: asking for another one stops the last."""

    def __init__(self, serve_together: Callable[..., list[Server]]) -> None:
        self._serve_together = serve_together
        self._stack = ExitStack()
        self._pairs: dict[str, Pair] = {}
        self._running = ""
        self._tried: set[str] = set()

    def __getitem__(self, name: str) -> Pair:
        """The pair of that name, started if need be."""
        if name != self._running:
            if name in self._tried - set(self._pairs):
                pytest.fail(f"pair {name!r} did not start before: not tried again")
            self._tried.add(name)
            self.stop()
            self._pairs[name] = self._start(PAIRS[name])
            self._running = name
        return self._pairs[name]

    def stop(self) -> None:
        """Stop what runs."""
        self._running = ""
        self._stack.close()

    def lane(self, name: str, shape: Shape) -> str | None:
        """The lane that serves a shape: as noted when it was sent, or else it is sent now."""
        if name not in self._pairs or shape.id not in self._pairs[name].sent:
            self[name].send(shape)
        return self._pairs[name].lanes.get(shape.id)

    def _start(self, options: tuple[str, ...]) -> Pair:
        stack = self._stack
        servers = self._serve_together(stack, upstream=options, ours=(*options, *OURS))
        threads = stack.enter_context(ThreadPoolExecutor(2))
        ports = [urlsplit(server.url).port or 0 for server in servers]
        upstream, ours = (stack.enter_context(Client(port)) for port in ports)
        pair = Pair(upstream, ours, threads)
        pair.learn_whether_lanes_are_counted()
        return pair


# Not a parametrised fixture: pytest would tear down and start servers for every single shape.
@pytest.fixture(scope="module")
def pairs(serve_together: Callable[..., list[Server]]) -> Iterator[Pairs]:
    """Pairs of servers with the same options, upstream's and ours, by the names in PAIRS."""
    running = Pairs(serve_together)
    yield running
    running.stop()


def _cases(only_fast: bool = False) -> list[Any]:
    return [
        pytest.param(name, shape, id=f"{name}-{shape.id}")
        for name, shapes in SHAPES.items()
        for shape in shapes
        if shape.fast or not only_fast
    ]


def _unexpected(shape: Shape, found: list[str]) -> list[str]:
    patterns = [what for shapes, what, _ in DELIBERATE if fnmatchcase(shape.id, shapes)]
    return [line for line in found if not any(fnmatchcase(line, what) for what in patterns)]


@pytest.mark.parametrize(("name", "shape"), _cases())
def test_ours_answers_as_upstream(
    pairs: Pairs, name: str, shape: Shape, record_property: Callable[[str, object], None]
) -> None:
    """Every difference is named: status, headers, connection, body, events."""
    upstream, ours = pairs[name].send(shape)
    record_property("lane", pairs.lane(name, shape))  # for --junitxml
    found = _unexpected(shape, differences(upstream, ours))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("name", "shape"), _cases(only_fast=True))
def test_common_shapes_take_the_fast_lane(pairs: Pairs, name: str, shape: Shape) -> None:
    """A fast lane that hands everyday requests to the full lane is right, and no use."""
    lane = pairs.lane(name, shape)
    if lane is None:
        pytest.skip("the server does not count its requests by lane")
    assert lane == "fast"


def test_the_suite_is_as_large_as_it_claims() -> None:
    """Ids are unique (pytest would rename the second in silence), shapes at least 250."""
    for shapes in SHAPES.values():
        assert [name for name, count in Counter(s.id for s in shapes).items() if count > 1] == []
    assert sum(len(shapes) for shapes in SHAPES.values()) >= 250
