"""Twice the load that a server can carry: how fast it refuses, and what the accepted notice.

    python -m scalellm_plugins.benchmarks.overload [--streams N] [--seconds S] [--output FILE.json]

One server on the simulated GPU that runs `--streams` sequences at a time; its tenants file gives
the limit and is rewritten between the parts, so all of them meet the same server:

1. what it can carry: a closed loop that keeps every sequence busy;
2. unloaded: requests at random moments (Poisson), a third of that;
3. limited: twice of what it can carry, with a limit on requests in flight;
4. unlimited: the same without a limit.

An open loop: a request is sent when its time has come, whatever has been answered. The load
generator shares the processors with the server, and so is part of every latency.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from . import workloads
from .load import percentile
from .responses import ResponseParser
from .server import Server, exit_on_signals
from .systems import BUILT_IN, SERVED_NAME, System, Target

_DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
_REREAD_S = 2.5
"""A changed tenants file is read within a second; twice that and some."""
_START_TIMEOUT_S = 600.0
_PATH = "/v1/chat/completions"


@dataclass
class Outcome:
    """What became of a part's requests. Latencies in seconds."""

    refused: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    """By how much a request was sent after its time: the load generator's own lag."""
    retry_after: list[int] = field(default_factory=list)
    failed: int = 0
    unanswered: int = 0
    sent: int = 0

    def summary(self) -> dict[str, Any]:
        """Return counts and percentiles (ms)."""
        found: dict[str, Any] = {
            "sent": self.sent,
            "accepted": len(self.whole),
            "refused": len(self.refused),
            "failed": self.failed,
            "unanswered": self.unanswered,
        }
        for name, values in (
            ("rejection", self.refused),
            ("ttft", self.first),
            ("e2e", self.whole),
            ("client_late", self.late),
        ):
            for share in (50, 99):
                value = percentile(sorted(values), share / 100)
                found[f"{name}_p{share}_ms"] = None if value is None else round(value * 1000, 2)
        if self.retry_after:
            found["retry_after_s"] = [min(self.retry_after), max(self.retry_after)]
        return found


class Connection(asyncio.Protocol):
    """One keep-alive connection; `ask` sends a request on it."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._parser = ResponseParser()
        self._transport: asyncio.Transport | None = None
        self._start = self._first = 0.0
        self._retry_after = b""
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    def ask(self, request: bytes) -> None:
        """Send a request."""
        assert self._transport is not None
        self._parser.reset()
        self._retry_after = b""
        self._first = 0.0
        self.busy = True
        self._start = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        now = time.perf_counter()
        if not self._parser.status:
            self._retry_after = data.partition(b"retry-after: ")[2].partition(b"\r")[0]
        if self._parser.feed(data) and not self._first:
            self._first = now
        if self._parser.done:
            self._done(now)

    def _done(self, now: float) -> None:
        self.busy = False
        outcome = self._part.outcome
        if self._parser.status in (429, 503):
            outcome.refused.append(now - self._start)
            outcome.retry_after.append(int(self._retry_after or 0))
        elif self._parser.status == 200 and not self._parser.failure:
            outcome.whole.append(now - self._start)
            outcome.first.append(self._first - self._start)
        else:
            outcome.failed += 1
        self._part.answered(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        del exc
        if self.busy:
            self.busy = False
            self._part.outcome.failed += 1

    def close(self) -> None:
        """Be done with it, whatever is going on."""
        if self.busy:
            self._part.outcome.unanswered += 1
        self.busy = False
        if self._transport is not None:
            self._transport.abort()


class Part:
    """One part of the run, on its own connections."""

    def __init__(self, port: int, requests: Sequence[bytes]) -> None:
        self.outcome = Outcome()
        self._port = port
        self._requests = requests
        self._idle: list[Connection] = []
        self._all: list[Connection] = []
        self._again = False

    async def connect(self, count: int) -> None:
        """Open connections ahead of time: their set-up is not what is measured."""
        loop = asyncio.get_running_loop()
        for _ in range(count):
            _, made = await loop.create_connection(
                lambda: Connection(self), "127.0.0.1", self._port
            )
            self._all.append(made)
            self._idle.append(made)

    def answered(self, connection: Connection) -> None:
        """A connection is free; in a closed loop it asks again."""
        self._idle.append(connection)
        if self._again:
            self._send()

    def _send(self) -> None:
        self._idle.pop().ask(self._requests[self.outcome.sent % len(self._requests)])
        self.outcome.sent += 1

    async def closed(self, streams: int, seconds: float) -> float:
        """Keep `streams` requests going; return how many per second were answered."""
        await self.connect(streams)
        self._again = True
        for _ in range(streams):
            self._send()
        await asyncio.sleep(seconds / 3)  # until they are out of step
        before, start = len(self.outcome.whole), time.perf_counter()
        await asyncio.sleep(seconds)
        rate = (len(self.outcome.whole) - before) / (time.perf_counter() - start)
        self._again = False
        await self.end(10)
        return rate

    async def open(self, rate: float, seconds: float, drain_s: float, seed: int) -> None:
        """Send at random moments, `rate` per second on average."""
        moments, at = [], 0.0
        random_ = random.Random(seed)
        while (at := at + random_.expovariate(rate)) < seconds:
            moments.append(at)
        start = time.perf_counter()
        for moment in moments:
            wait = start + moment - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            if not self._idle:
                await self.connect(1)
            self.outcome.late.append(time.perf_counter() - start - moment)
            self._send()
        await self.end(drain_s)

    async def end(self, drain_s: float) -> None:
        """Wait for answers, at most so long, and drop the rest."""
        deadline = time.perf_counter() + drain_s
        while any(one.busy for one in self._all) and time.perf_counter() < deadline:
            await asyncio.sleep(0.05)
        for one in self._all:
            one.close()


def _requests(port: int, output: int, count: int) -> list[bytes]:
    texts = workloads.Texts(workloads.words_of(_DEMO), seed=1)
    body = workloads.Body(SERVED_NAME, stream=True)
    made = []
    for _ in range(count):
        content = body.encode(workloads.message("user", texts.text(100)), output)
        head = (
            f"POST {_PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        made.append(head.encode() + content)
    return made


async def measure(port: int, tenants: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run the four parts against a server that is up."""
    requests = _requests(port, options.output_tokens, 64)

    async def limit(number: int | None) -> None:
        tenants.write_text(json.dumps([{"name": "default", "max_requests": number}]))
        await asyncio.sleep(_REREAD_S)

    async def part(name: str, rate: float, drain_s: float) -> None:
        made = Part(port, requests)
        await made.connect(4 * options.streams)
        await made.open(rate, options.seconds, drain_s, seed=len(results["parts"]))
        results["parts"][name] = made.outcome.summary() | {"rate_per_s": round(rate, 2)}

    results: dict[str, Any] = {"streams": options.streams, "parts": {}}
    await Part(port, requests).closed(options.streams, 1.0)  # warm up
    carried = await Part(port, requests).closed(options.streams, options.seconds / 2)
    results["carried_per_s"] = round(carried, 2)
    await part("unloaded", carried / 3, 10)
    await limit(options.streams)
    await part("limited", 2 * carried, 10)
    await limit(None)
    await part("unlimited", 2 * carried, options.seconds)
    return results


def report(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        f"{results['streams']} sequences at a time; the server carries "
        f"{results['carried_per_s']:.1f} requests per second.",
        "",
        "| part | requests/s | accepted | refused | rejection p50 / p99 ms | TTFT p50 / p99 ms "
        "| E2E p50 / p99 ms | client late p99 ms |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def pair(row: dict[str, Any], name: str) -> str:
        values = [row[f"{name}_p{share}_ms"] for share in (50, 99)]
        return " / ".join("–" if value is None else f"{value:,.1f}" for value in values)

    for name, row in results["parts"].items():
        unanswered = f" ({row['unanswered']} unanswered)" if row["unanswered"] else ""
        lines.append(
            f"| {name} | {row['rate_per_s']:.1f} | {row['accepted']}{unanswered} "
            f"| {row['refused']} | {pair(row, 'rejection')} | {pair(row, 'ttft')} "
            f"| {pair(row, 'e2e')} | {row['client_late_p99_ms']:.1f} |"
        )
    return "\n".join(lines)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("overload", description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=16, help="sequences at a time")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a part")
    parser.add_argument("--output-tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--gpu", default="h200", help="simulated card")
    parser.add_argument("--preset", default="8b", help="simulated model")
    parser.add_argument("--workers", type=int, default=1, help="API server processes")
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    parser.add_argument("--quiet-lock", type=Path, help="file to lock while measuring")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Start the server, measure, print the table."""
    import fcntl

    options = _options(sys.argv[1:] if argv is None else argv)
    exit_on_signals()
    with tempfile.TemporaryDirectory() as folder:
        tenants = Path(folder) / "tenants.json"
        tenants.write_text('[{"name": "default"}]')
        base = BUILT_IN["scalellm"]
        system = System(
            "overload",
            "the fast lane with a tenants file",
            base.plugins,
            (
                *("--scalellm.frontend.workers", str(options.workers)),
                *("--scalellm.frontend.tenants", str(tenants)),
                *("--max-num-seqs", str(options.streams), "--max-model-len", "1024"),
            ),
        )
        target = Target(_DEMO, options.gpu, options.preset)
        server = Server(system, target, Path(folder))
        try:
            server.start()
            server.wait_ready(_START_TIMEOUT_S, lambda _: None)
            with (options.quiet_lock or Path(folder) / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                results = asyncio.run(measure(server.port, tenants, options))
        finally:
            for note in server.stop():
                print(note, file=sys.stderr)
    print(report(results))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
