"""The load generator: N streams in a closed loop, each asking again as soon as it is answered.

A process of its own, `python -m scalellm_plugins.benchmarks.load SPEC.json`. It shares the
processor with the server that it measures, so it is raw: one `asyncio.Protocol` per stream (uvloop
where there is one), HTTP/1.1 keep-alive, hand-made requests, one time stamp per read, and
`responses.py` instead of a JSON parser. What it costs is in every result (`client_cpu_s`).

A run has four parts. All streams connect and make a first, shortened request, which spreads them
evenly over the cycle of a request (see `workloads.Prompts`). When every stream has been answered
once, the window opens: the line `begin` goes to stdout, and `end` when it closes, so that the
parent can read the server's CPU clocks at the same moments. The load stays as it is until all that
was asked before the end is answered: without it, the last requests would have the server more and
more to themselves. Then no stream asks again, and what takes longer than `_DRAIN_S` to finish is
dropped, unmeasured. The last line is the result as JSON.

What counts:

- output tokens: those that arrived in the window. A streamed answer's tokens (from its `usage`) are
  shared out over its events; an unstreamed one's over its whole duration.
- TTFT: request sent to first event with text, of the requests that began in the window. Null where
  nothing is streamed. ITL: between reads that bring text, in the window; events that come in one
  read are 0 apart. TPOT: (end - first) / (tokens - 1) for each request. E2E: request sent to answer
  complete.
- failed: no connection, connection lost, no answer in time, a status other than 200, an error in
  the stream, or another number of output tokens than was asked for.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from .responses import ProtocolError, ResponseParser
from .workloads import Body, Prompts, Template, Texts, Workload

_ATTEMPTS = 5  # failures in a row after which a stream gives up: the server is gone
_BACKOFF_S = 0.2
_DRAIN_S = 3.0


@dataclass(frozen=True)
class Spec:
    """One run. Times in seconds; `words` is a JSON file (see `workloads.words_of`)."""

    host: str
    port: int
    model: str
    workload: Workload
    template: Template
    stream: bool
    streams: int
    window_s: float
    words: str
    seed: int
    warmup_s: float = 1.5
    timeout_s: float = 300.0
    path: str = "/v1/chat/completions"

    def to_json(self) -> str:
        """Return the spec as the process expects it."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Spec:
        """The reverse of `to_json`."""
        raw = json.loads(text)
        return Spec(
            **{
                **raw,
                "workload": Workload(**raw["workload"]),
                "template": Template(**raw["template"]),
            }
        )


@dataclass(frozen=True)
class Request:
    """One answered request. Times as of `time.perf_counter`."""

    start: float
    first: float  # 0 if no text came
    end: float
    tokens: int
    events: int
    events_in_window: int


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The value below which `share` (0-1) of the ordered values lie, interpolated linearly."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Run:
    """What the streams share: the window, what was measured, what failed."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.open = False
        self.closed = False
        self.stopping = False
        self.over = False
        self.outstanding = 0  # requests sent before the window closed, not answered yet
        self.settled = asyncio.Event()
        self.gaps = array("d")
        self.requests: list[Request] = []
        self.failures: Counter[str] = Counter()
        self.wrong_prompts = 0
        self.prompt_tokens = 0
        self.head = (
            f"POST {spec.path} HTTP/1.1\r\nHost: {spec.host}:{spec.port}\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        ).encode()

    def ended(self, counted: bool) -> None:
        """Note that a request has been answered or has failed."""
        self.outstanding -= counted
        if self.closed and not self.outstanding:
            self.settled.set()


class Stream(asyncio.Protocol):
    """One user: a connection that sends a request, reads the answer and sends the next."""

    def __init__(self, run: Run, prompts: Prompts) -> None:
        self._run = run
        self._prompts = prompts
        self._parser = ResponseParser()
        self._transport: asyncio.Transport | None = None
        self._busy = False
        self._counted = False
        self._failures = 0
        self.answered = asyncio.Event()
        self.finished = asyncio.Event()
        # Per-request state
        self._start = 0.0
        self._first = 0.0
        self._last = 0.0
        self._in_window = 0

    async def connect(self) -> None:
        """Connect and send the first request, or what comes next after a lost connection."""
        spec = self._run.spec
        try:
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: self, spec.host, spec.port)
        except OSError as error:
            self._failed(f"no connection: {error.strerror or error}")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's: the connection stands."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        if self._run.stopping:
            self.close()
        else:
            self._send(b"")

    def data_received(self, data: bytes) -> None:
        """asyncio's: the hot path, once per read."""
        now = time.perf_counter()
        parser = self._parser
        try:
            events = parser.feed(data)
        except ProtocolError as error:
            self._failed(str(error))
            return
        if events:
            run = self._run
            if not self._first:
                self._first = now
                if run.open:
                    self._in_window += events
            elif run.open:
                self._in_window += events
                run.gaps.append(now - self._last)
                if events > 1:
                    run.gaps.extend([0.0] * (events - 1))
            self._last = now
        if parser.done:
            self._complete(now)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's: the connection is gone, whoever closed it."""
        self._transport = None
        if self._busy and not self._run.over:
            self._failed(f"connection lost: {type(exc).__name__ if exc else 'closed by server'}")

    def check_timeout(self, now: float) -> None:
        """Give up on a request that has taken too long."""
        if self._busy and now - self._start > self._run.spec.timeout_s:
            self._failed(f"no answer within {self._run.spec.timeout_s:g} s")

    def _send(self, reply: bytes) -> None:
        body = self._prompts.next(reply)
        self._parser.reset()
        self._first = self._last = 0.0
        self._in_window = 0
        self._busy = True
        self._counted = not self._run.closed
        self._run.outstanding += self._counted
        assert self._transport is not None
        self._start = time.perf_counter()
        self._transport.write(b"%b%d\r\n\r\n%b" % (self._run.head, len(body), body))

    def _complete(self, now: float) -> None:
        run, parser = self._run, self._parser
        wanted = self._prompts.expected_output
        if parser.failure or parser.completion_tokens != wanted:
            self._failed(
                parser.failure or f"{parser.completion_tokens} output tokens instead of {wanted}"
            )
            return
        self._busy = False
        self._failures = 0
        expected = self._prompts.expected_prompt
        run.wrong_prompts += expected is not None and expected != parser.prompt_tokens
        run.prompt_tokens += parser.prompt_tokens
        run.requests.append(
            Request(self._start, self._first, now, wanted, parser.events, self._in_window)
        )
        self.answered.set()
        run.ended(self._counted)
        self._go_on(b"".join(parser.text))

    def _go_on(self, reply: bytes) -> None:
        if self._run.stopping:
            self.close()
        elif self._transport is None or self._parser.must_close:
            self._drop()
            asyncio.get_running_loop().create_task(self.connect())
        else:
            self._send(reply)

    def _failed(self, reason: str) -> None:
        self._run.failures[reason] += 1
        self._run.ended(self._busy and self._counted)
        self._busy = False
        self._failures += 1
        self._drop()
        if self._run.stopping or self._failures >= _ATTEMPTS:
            self.close()
        else:
            loop = asyncio.get_running_loop()
            loop.call_later(_BACKOFF_S, lambda: loop.create_task(self.connect()))

    def _drop(self) -> None:
        if self._transport is not None:
            transport, self._transport = self._transport, None
            transport.abort()

    def close(self) -> None:
        """Be done, whatever is still going on."""
        self._drop()
        self.answered.set()
        self.finished.set()


async def drive(spec: Spec, announce: bool = True) -> dict[str, Any]:
    """Make one run and return its result; `announce` prints `begin` and `end`."""
    run = Run(spec)
    words = json.loads(Path(spec.words).read_text())
    texts = Texts(words, spec.seed)
    body = Body(spec.model, spec.stream)
    streams = [
        Stream(run, Prompts(spec.workload, texts, spec.template, body, index, spec.streams))
        for index in range(spec.streams)
    ]
    watch = asyncio.create_task(_watch(streams))
    started = time.perf_counter()
    await asyncio.gather(*(stream.connect() for stream in streams))
    await asyncio.gather(*(stream.answered.wait() for stream in streams))
    await asyncio.sleep(started + spec.warmup_s - time.perf_counter())
    _say("begin", announce)
    run.open, opened, cpu = True, time.perf_counter(), time.process_time()
    # Ends early when no stream is left: the server has gone.
    gone = asyncio.gather(*(stream.finished.wait() for stream in streams))
    await asyncio.wait([gone], timeout=spec.window_s)
    run.open, closed, cpu = False, time.perf_counter(), time.process_time() - cpu
    _say("end", announce)
    run.closed = True
    if run.outstanding:
        await run.settled.wait()
    run.stopping = True
    await asyncio.wait([gone], timeout=_DRAIN_S)
    run.over = True
    for stream in streams:
        stream.close()
    await gone
    watch.cancel()
    return _result(run, opened, closed, cpu)


async def _watch(streams: list[Stream]) -> None:
    while True:
        await asyncio.sleep(1)
        now = time.perf_counter()
        for stream in streams:
            stream.check_timeout(now)


def _say(line: str, announce: bool) -> None:
    if announce:
        print(line, flush=True)


def _result(run: Run, opened: float, closed: float, client_cpu_s: float) -> dict[str, Any]:
    streamed = run.spec.stream
    tokens = 0.0
    for request in run.requests:
        if streamed and request.events:
            tokens += request.tokens * request.events_in_window / request.events
        else:
            inside = min(request.end, closed) - max(request.start, opened)
            tokens += request.tokens * max(0.0, inside) / (request.end - request.start)
    mine = [request for request in run.requests if opened <= request.start < closed]
    first = sorted(r.first - r.start for r in mine if r.first) if streamed else []
    pace = sorted((r.end - r.first) / (r.tokens - 1) for r in mine if r.first) if streamed else []
    whole = sorted(r.end - r.start for r in mine)
    gaps = sorted(run.gaps)
    events = sum(r.events for r in run.requests)
    answered = sum(r.tokens for r in run.requests)
    return {
        "window_s": closed - opened,
        "output_tokens": tokens,
        "requests": len(run.requests),
        "failed": sum(run.failures.values()),
        "failures": dict(run.failures.most_common(5)),
        **_percentiles_ms("ttft", first),
        **_percentiles_ms("itl", gaps),
        **_percentiles_ms("tpot", pace),
        **_percentiles_ms("e2e", whole),
        "client_cpu_s": client_cpu_s,
        "tokens_per_event": answered / events if streamed and events else None,
        "prompt_tokens": run.prompt_tokens / len(run.requests) if run.requests else None,
        "wrong_prompts": run.wrong_prompts,
    }


def _percentiles_ms(name: str, ordered: Sequence[float]) -> dict[str, float | None]:
    values = {share: percentile(ordered, share / 100) for share in (50, 99)}
    return {
        f"{name}_p{share}_ms": None if value is None else value * 1000
        for share, value in values.items()
    }


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def main(argv: Sequence[str]) -> int:
    """Run the spec in the file `argv[0]` and print the result as JSON."""
    spec = Spec.from_json(Path(argv[0]).read_text())
    # A collection would show up as a stall of every stream; a run makes no cycles worth one.
    gc.disable()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        print(json.dumps(runner.run(drive(spec))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
