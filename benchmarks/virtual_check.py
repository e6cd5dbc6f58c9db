"""Whether virtual time tells the truth: one workload, on a real server and in `scalellm simulate`.

    python -m scalellm_plugins.benchmarks.virtual_check [--cells calm,full,fair] [--output FILE]

Each cell starts `vllm serve` on the simulated GPU with every feature of this package, sends it the
workload in an open loop (a request goes out when its time has come, whatever has been answered),
streaming, and measures at the client; then simulates the same requests with the same settings.
The simulated GPU keeps the same times in both. What differs is the rest of the server: HTTP, the
event loop, the shared-memory layer and the engine's own CPU take no time in a simulation, and here
they share two cores with the load generator. So the card is a slow one, whose steps of 70 ms and
more hide a server's milliseconds; on a fast card the server, not virtual time, is what one would
measure. Passed: every compared figure within 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from scalellm_plugins.virtual import policies, workload
from scalellm_plugins.virtual.job import Record, Request, Settings
from scalellm_plugins.virtual.metrics import e2e, spread, tpot, ttft
from scalellm_plugins.virtual.runs import run_all
from scalellm_plugins.virtual.tenants import Tenant

from .responses import ResponseParser
from .server import Server, exit_on_signals
from .systems import BUILT_IN, SERVED_NAME, System, Target

TOLERANCE = 0.05
_DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
_START_TIMEOUT_S = 300.0
_WARM_UP = 12
_LONGEST = 4096
_COMPARED = (("ttft", ("mean", "p50")), ("tpot", ("mean", "p50")), ("e2e", ("mean", "p50")))


@dataclass(frozen=True)
class Cell:
    """One comparison."""

    summary: str
    policy: str
    tenants: tuple[Tenant, ...]
    seats: int
    kv_blocks: int = 1500


CELLS = {
    "calm": Cell("nothing waits", "fcfs", (Tenant(rate=0.8),), seats=64),
    "full": Cell("more than the server carries: requests queue", "fcfs", (Tenant(rate=2.0),), 16),
    "fair": Cell(
        "two tenants, one floods, and the fair policy",
        "fair",
        (Tenant(name="calm", rate=0.3), Tenant(name="flood", rate=1.8)),
        seats=16,
    ),
}


class Stream(asyncio.Protocol):
    """One request on a connection of its own."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._parser = ResponseParser()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sent = self.first = self.last = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        self.sent = time.perf_counter()
        cast(asyncio.Transport, transport).write(self._body)

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        now = time.perf_counter()
        if self._parser.feed(data):
            self.first = self.first or now
            self.last = now
        if self._parser.done and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("closed by the server"))

    def record(self, origin: float) -> Record:
        """What was measured, in seconds since `origin`.

        Raises:
            RuntimeError: the answer was an error.
        """
        if self._parser.status != 200 or self._parser.failure:
            raise RuntimeError(f"status {self._parser.status}: {self._parser.failure}")
        return Record(
            first=self.first - origin,
            last=self.last - origin,
            tokens=self._parser.completion_tokens,
            outcome="done",
        )


def _body(port: int, number: int, request: Request) -> bytes:
    content = json.dumps(
        {
            "model": SERVED_NAME,
            "prompt": workload.prompt_ids(number, request),
            "max_tokens": request.output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "vllm_xargs": {"scalellm_tenant": request.tenant},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def send(port: int, requests: Sequence[Request], offset: int = 0) -> list[Any]:
    """Send requests at their times; return pairs of the request as it was sent, and its record."""
    loop = asyncio.get_running_loop()
    bodies = [_body(port, number + offset, one) for number, one in enumerate(requests)]
    origin = time.perf_counter()

    async def one(body: bytes, request: Request) -> Any:
        _, stream = await loop.create_connection(lambda: Stream(body), "127.0.0.1", port)
        await stream.done
        record = stream.record(origin)
        if record.tokens != request.output:
            raise RuntimeError(f"{record.tokens} tokens instead of {request.output}")
        return stream.sent - origin, record

    tasks = []
    for body, request in zip(bodies, requests, strict=True):
        await asyncio.sleep(max(0.0, origin + request.at - time.perf_counter()))
        tasks.append(asyncio.create_task(one(body, request)))
    return list(await asyncio.gather(*tasks))


def real(cell: Cell, options: argparse.Namespace, requests: list[Request]) -> dict[str, Any]:
    """Figures of a real server."""
    base = BUILT_IN["scalellm"]
    arguments = [
        *("--scalellm.frontend.workers", "1", "--max-num-seqs", str(cell.seats)),
        *("--max-num-batched-tokens", str(options.batch), "--max-model-len", str(_LONGEST)),
        *("--scalellm.sim.kv_blocks", str(cell.kv_blocks)),
    ]
    if cell.policy != "fcfs":
        arguments += ["--scalellm.scheduler.policy", cell.policy]
    with tempfile.TemporaryDirectory() as folder:
        system = System("virtual-check", cell.summary, base.plugins, tuple(arguments))
        server = Server(system, Target(_DEMO, options.gpu, options.model), Path(folder))
        try:
            server.start()
            server.wait_ready(_START_TIMEOUT_S, lambda _: None)
            asyncio.run(send(server.port, requests[:_WARM_UP], offset=1 << 24))
            pairs = asyncio.run(send(server.port, requests))
        finally:
            for note in server.stop():
                print(note, file=sys.stderr)
    # Latencies count from when a request was sent; how late that was is the client's affair.
    sent = [
        Request(at=max(0.0, at), tenant=one.tenant, prompt=one.prompt, output=one.output)
        for (at, _), one in zip(pairs, requests, strict=True)
    ]
    late = spread(at - one.at for (at, _), one in zip(pairs, requests, strict=True))
    return figures(sent, [record for _, record in pairs]) | {"client_late_ms": late}


def virtual(cell: Cell, options: argparse.Namespace, requests: list[Request]) -> dict[str, Any]:
    """Figures of the same in virtual time."""
    settings = Settings(
        gpu=options.gpu,
        model=options.model,
        max_model_len=_LONGEST,
        max_num_seqs=cell.seats,
        max_num_batched_tokens=options.batch,
        kv_blocks=cell.kv_blocks,
    )
    (policy,) = policies.parse([cell.policy])
    (run,) = run_all(settings, [policy], requests).values()
    return figures(requests, run.records)


def figures(requests: Sequence[Request], records: Sequence[Record]) -> dict[str, Any]:
    """What is compared, of all and of each tenant."""
    pairs = list(zip(requests, records, strict=True))
    tenants = sorted({request.tenant for request in requests})
    end = max(record.last or 0.0 for record in records)
    start = min(request.at for request in requests)
    found: dict[str, Any] = {
        "output_tok_s": sum(record.tokens for record in records) / (end - start)
    }
    groups = {"": pairs} | (
        {f"{name}: ": [p for p in pairs if p[0].tenant == name] for name in tenants}
        if len(tenants) > 1
        else {}
    )
    for prefix, some in groups.items():
        found[f"{prefix}ttft"] = spread(t for p in some if (t := ttft(*p)) is not None)
        found[f"{prefix}tpot"] = spread(t for p in some if (t := tpot(p[1])) is not None)
        found[f"{prefix}e2e"] = spread(t for p in some if (t := e2e(*p)) is not None)
    return found


def compare(served: dict[str, Any], simulated: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each figure; those that decide say so."""
    rows = [("output_tok_s", served["output_tok_s"], simulated["output_tok_s"], True)]
    deciding = {(name, part) for name, parts in _COMPARED for part in parts}
    for name, values in simulated.items():
        if isinstance(values, dict):
            for part in ("mean", "p50", "p90", "p99"):
                short = name.rpartition(": ")[2]
                # Of a tenant's few requests, the mean only.
                decides = (short, part) in deciding if short == name else part == "mean"
                rows.append((f"{name} {part}", served[name][part], values[part], decides))
    return [
        {
            "figure": name,
            "server": round(theirs, 3),
            "virtual": round(ours, 3),
            "difference": round(ours / theirs - 1, 5),
            "decides": decides,
        }
        for name, theirs, ours, decides in rows
    ]


def _table(cell: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{cell}: {CELLS[cell].summary}",
        "",
        "| figure | server | virtual | difference | within 5 % |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        within = "" if not row["decides"] else "yes" if _within(row) else "NO"
        lines.append(
            f"| {row['figure']} | {row['server']:,.2f} | {row['virtual']:,.2f} "
            f"| {row['difference']:+.2%} | {within} |"
        )
    return "\n".join(lines)


def _within(row: dict[str, Any]) -> bool:
    return bool(abs(row["difference"]) <= TOLERANCE)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print tables, write JSON if asked for; 1 if a figure is off."""
    parser = argparse.ArgumentParser("virtual_check", description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", default=",".join(CELLS), help="which of " + ", ".join(CELLS))
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic in each")
    parser.add_argument("--gpu", default="l4", help="as scalellm.sim.gpu")
    parser.add_argument("--model", default="8b", help="as scalellm.sim.model")
    parser.add_argument("--batch", type=int, default=2048, help="as --max-num-batched-tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, help="put the results there, as JSON; other cells stay"
    )
    options = parser.parse_args(argv)
    exit_on_signals()
    lengths = workload.Defaults(
        prompt="lognormal:median=600:sigma=0.5:max=2000",
        output="lognormal:median=110:sigma=0.6:max=800",
    )
    words = sys.argv[1:] if argv is None else argv
    results, off = {}, []
    for name in options.cells.split(","):
        cell = CELLS[name]
        requests = workload.synthetic(cell.tenants, lengths, options.seconds, options.seed)
        served = real(cell, options, requests)
        rows = compare(served, virtual(cell, options, requests))
        results[name] = {
            "command": f"virtual_check {' '.join(words)}",
            "summary": cell.summary,
            "requests": len(requests),
            "client_late_ms": served["client_late_ms"],
            "rows": rows,
        }
        off += [row for row in rows if row["decides"] and not _within(row)]
        print(_table(name, rows), end="\n\n", flush=True)
    print(f"{'FAILED' if off else 'passed'}: figures within {TOLERANCE:.0%}")
    if options.output:
        before = json.loads(options.output.read_text()) if options.output.exists() else {}
        text = json.dumps(before | results, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
