"""A fast lane over vLLM's real objects and no engine: what the tests of its modules share."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Iterable
from types import SimpleNamespace
from typing import Any, TypeVar

from scalellm_plugins.benchmarks import lane_cost
from scalellm_plugins.frontends.bookkeeping import Bookkeeper
from scalellm_plugins.frontends.link import Link

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ARRIVAL = 1000.0
"""Arrival time (s) that `Bench.take` gives every request, so that latencies can be compared."""

Result = TypeVar("Result")


class Core:
    """The engine's client: keeps what it was given."""

    engine_ranks_managed = (0,)
    resources = SimpleNamespace(engine_dead=False)
    core_engines = (b"\0\0",)

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.aborts: list[str] = []
        self.refuses: Exception | None = None
        self.methods: dict[str, Any] = {}

    async def add_request_async(self, request: Any) -> None:
        """Keep it, or refuse it."""
        self.add(request)

    def add(self, request: Any, answer: Any = None) -> None:
        """Keep it, or refuse it."""
        if self.refuses is not None:
            raise self.refuses
        self.requests[request.request_id] = request

    async def abort_requests_async(self, ids: list[str]) -> None:
        """Keep them."""
        self.aborts += ids

    async def _call_utility_async(self, method: str, *args: Any, engine: bytes) -> Any:
        """Call a method of the engine, which a test has to bring."""
        assert engine in self.core_engines
        return await self.methods[method](*args)


class Wire:
    """A connection's transport that keeps what was written, one entry for each write."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = self.aborted = False

    @property
    def data(self) -> bytes:
        """Everything that was written."""
        return b"".join(self.writes)

    def write(self, data: bytes) -> None:
        """Keep it."""
        self.writes.append(data)

    def is_closing(self) -> bool:
        """Whether it was closed."""
        return self.closed

    def close(self) -> None:
        """Note it."""
        self.closed = True

    def abort(self) -> None:
        """Note it."""
        self.closed = self.aborted = True


class Timers:
    """The lane's event loop, whose timers are kept instead of run: tests run them."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self.calls: list[tuple[float, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_later(self, seconds: float, call: Any) -> None:
        """Keep it."""
        self.calls.append((seconds, call))


class Peer:
    """One client: the connection and cycle that uvicorn would have made, and what it got."""

    def __init__(self, bench: Bench, path: str, body: dict[str, Any]) -> None:
        self.body = body
        self.path = path
        self.connection, self.cycle = lane_cost.exchange(bench.lane, body)
        self.cycle.scope["path"] = path
        self.wire = self.connection.transport = Wire()
        self.connection.write = self.wire.write
        self.finished: list[Any] = []
        self.hold: int | None = None
        self.connection.finish = self.finished.append
        self.passed_on: list[Any] = []
        self.connection.pass_on = self.passed_on.append

    @property
    def answer(self) -> Any:
        """The lane's answer."""
        return self.connection.answer

    def response(self) -> tuple[int, dict[str, str], bytes]:
        """Return (status, headers, body without chunks); the answer must be complete."""
        assert self.finished == [self.cycle], "not finished, or more than once"
        return parse(self.wire.data)

    def streamed(self) -> bytes:
        """Return the body so far of an answer that may be unfinished."""
        head, _, rest = self.wire.data.partition(b"\r\n\r\n")
        return dechunk(rest)[0] if head else b""


def parse(data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Return (status, headers, body) of one complete answer."""
    head, _, rest = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    if "content-length" in headers:
        assert len(rest) == int(headers["content-length"])
        return int(status.split()[1]), headers, rest
    body, complete = dechunk(rest)
    assert complete, "no last chunk"
    return int(status.split()[1]), headers, body


def dechunk(data: bytes) -> tuple[bytes, bool]:
    """Return the chunks' content, and whether the last chunk was among them."""
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            assert data == b"\r\n", "bytes after the last chunk"
            return body, True
        body += data[:length]
        assert data[length : length + 2] == b"\r\n"
        data = data[length + 2 :]
    return body, False


class Bench:
    """One lane for all tests of the process: making one takes seconds."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = lane_cost.engine_client()
        self.tokenizer = self.client.renderer.tokenizer
        self.lane = self.run(self._build())
        self.timers = self.lane.loop = Timers(self.loop)
        self.routes = self.lane.routes
        self.core = Core()
        self.client.engine_core = self.core
        self.client.log_stats = True
        self.client._logger_ref = [self.client.logger_manager]
        self.link = self.lane.link = stepping_link(self.client)

    async def _build(self) -> Any:
        return await lane_cost.build_lane(self.client)

    def run(self, work: Awaitable[Result]) -> Result:
        """Run in the lane's event loop."""
        return self.loop.run_until_complete(_await(work))

    def turn(self) -> None:
        """Let everything run that is ready, and what that makes ready."""
        self.run(turns())

    def fresh(self) -> None:
        """Forget the requests of other tests, and what was counted of them."""
        from vllm.v1.metrics.loggers import StatLoggerManager

        self.turn()
        self.link.book.flush()  # or its timer would do it, into the new metrics
        self.lane.states.clear()
        self.client.output_processor.external_req_ids.clear()
        self.lane._headless.clear()
        self.timers.calls.clear()
        self.core.__init__()  # type: ignore[misc]
        self.client.errored = False
        manager = StatLoggerManager(self.client.vllm_config, engine_idxs=[0], client_count=1)
        self.client.logger_manager = manager
        self.client._logger_ref = [manager]
        self.lane.latencies = type(self.lane.latencies)(self.client)
        self.link = self.lane.link = stepping_link(self.client)

    def peer(self, path: str = CHAT, **body: Any) -> Peer:
        """Make a client with a request; `messages` and `model` are added."""
        if path == CHAT:
            body = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], **body}
        else:
            body = {"prompt": "What is", **body}
        return Peer(self, path, {"model": "demo", **body})

    def take(self, path: str = CHAT, **body: Any) -> Peer:
        """Have the lane take a request, and hand it to the engine."""
        peer = self.peer(path, **body)
        assert self.lane.take(peer.connection, peer.cycle), f"declined: {peer.body}"
        if peer.answer.stats is not None:
            peer.answer.stats.arrival_time = ARRIVAL
        peer.hold = peer.answer.hold
        self.turn()
        return peer

    def step(self, outputs: Iterable[Any], timestamp: float = 1.0, **others: Any) -> None:
        """Deliver a step's outputs as the engine's messages are, and write what came of it."""
        from vllm.v1.engine import EngineCoreOutputs

        message = EngineCoreOutputs(outputs=list(outputs), timestamp=timestamp, **others)
        self.deliver(message)

    def deliver(self, message: Any) -> None:
        """Deliver one message of the engine."""

        async def handle() -> None:
            self.link._handle(message)
            await turns()

        self.run(handle())

    def idle(self) -> bool:
        """Whether nothing is left of any request."""
        processor = self.client.output_processor
        return not self.lane.states and not processor.external_req_ids


async def turns() -> None:
    """Let everything run that is ready, and what that makes ready."""
    for _ in range(8):
        await asyncio.sleep(0)


async def _await(work: Awaitable[Result]) -> Result:
    return await work


def stepping_link(client: Any) -> Link:
    """A link without sockets: its `_handle` does with messages what it does in a server."""
    link = object.__new__(Link)
    link._client = client
    link._core = core = client.engine_core
    link.book = book = Bookkeeper(client)
    statistics = book.statistics

    def at_a_known_time() -> Any:
        made = statistics()
        made.iteration_timestamp = ARRIVAL + 5.0
        return made

    book.statistics = at_a_known_time  # type: ignore[method-assign]
    link.add = core.add  # type: ignore[method-assign]
    link.abort = lambda ids: core.aborts.extend(ids)  # type: ignore[method-assign]
    return link


def output(peer: Any, tokens: list[int], reason: str | None = None, **others: Any) -> Any:
    """Make an output of the engine. The first of a request has `first=True`."""
    from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason
    from vllm.v1.metrics.stats import PrefillStats

    request_id = peer if isinstance(peer, str) else peer.answer.request_id
    if others.pop("first", False):
        prefill = PrefillStats(num_prompt_tokens=9, num_computed_tokens=5, num_cached_tokens=4)
        prefill.num_local_cached_tokens = 4
        others["prefill_stats"] = prefill
        others["events"] = [
            EngineCoreEvent(EngineCoreEventType.QUEUED, 0.25),
            EngineCoreEvent(EngineCoreEventType.SCHEDULED, 0.5),
        ]
    return EngineCoreOutput(
        request_id,
        list(tokens),
        finish_reason=None if reason is None else FinishReason[reason],
        **others,
    )


@functools.cache
def bench() -> Bench:
    """Return the lane of this process."""
    return Bench()


def events(body: bytes) -> list[Any]:
    """Take a stream of server-sent events apart; their `created` is left out."""
    parts = body.decode().split("\n\n")
    assert parts.pop() == "", "an event is incomplete"
    found: list[Any] = []
    for part in parts:
        assert part.startswith("data: ")
        data = part.removeprefix("data: ")
        if data == "[DONE]":
            found.append(data)
            continue
        event = json.loads(data)
        assert "error" in event or isinstance(event.pop("created"), int)
        # The order of the keys is vLLM's as well.
        found.append(json.dumps(event))
    return found


def text_of(event: str) -> str | None:
    """Return the text of an event that has no news but text (or none); None for any other."""
    if event == "[DONE]":
        return None
    content = json.loads(event)
    choices = content.get("choices")
    if not choices or choices[0].get("finish_reason") is not None or "usage" in content:
        return None
    delta = choices[0].get("delta", choices[0])
    if delta.get("role") is not None:
        return None
    text = delta.get("content", delta.get("text"))
    return text if isinstance(text, str) else None


def dropped(stream: list[str]) -> list[str]:
    """Leave out the events without any news: vLLM sends one while a character is unfinished."""
    return [event for event in stream if text_of(event) != ""]
