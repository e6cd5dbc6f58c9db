"""Two tenants on real vLLM, one of which floods: what the other notices of it.

    python -m scalellm_plugins.benchmarks.tenants [--seconds S] [--flood N] [--output FILE.json]

The demo model on this machine's CPU, no simulated GPU. "other" sends one request after the other;
"flood" keeps `--flood` requests going, of which `--seats` fit in the engine. Measured first alone,
then beside the flood, on servers that differ in their options only:

* fcfs: first come, first served, as vLLM;
* fair: `--scalellm.scheduler.policy fair`;
* fair, limited: the same, and the flood's tenant may have half of the seats at a time.

The servers run one after the other; the load generator shares the processors with them.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import workloads
from .overload import Part
from .server import Server, exit_on_signals
from .systems import SERVED_NAME, System, Target

_DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
_START_TIMEOUT_S = 600.0
_PATH = "/v1/completions"


def _requests(port: int, tenant: str, tokens: int, count: int) -> list[bytes]:
    texts = workloads.Texts(workloads.words_of(_DEMO), seed=sum(tenant.encode()))
    made = []
    for _ in range(count):
        body = {
            "model": SERVED_NAME,
            "prompt": texts.text(60),
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        }
        content = json.dumps(body).encode()
        head = (
            f"POST {_PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {tenant}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        made.append(head.encode() + content)
    return made


async def measure(port: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what "other" sees alone and beside the flood, and what both get then."""
    others = _requests(port, "other", options.tokens, 64)
    floods = _requests(port, "flood", options.tokens, 64)
    await Part(port, floods).closed(options.seats, 3.0)  # warm up
    alone = Part(port, others)
    await alone.closed(1, options.seconds)
    beside, flood = Part(port, others), Part(port, floods)
    flooding = asyncio.create_task(flood.closed(options.flood, options.seconds * 4 / 3))
    await asyncio.sleep(options.seconds / 6)  # until the seats are taken
    await beside.closed(1, options.seconds)
    rate = await flooding
    return {
        "alone": alone.outcome.summary(),
        "beside": beside.outcome.summary(),
        "flood": flood.outcome.summary() | {"answers_per_s": round(rate, 2)},
    }


def report(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| scheduler | TTFT of the other, alone: p50 / p99 ms | beside the flood: p50 / p99 ms "
        "| p99, times alone | answers of the flood per s |",
        "|---|---|---|---|---|",
    ]
    for name, row in results.items():
        alone, beside = row["alone"], row["beside"]
        ratio = beside["ttft_p99_ms"] / alone["ttft_p99_ms"]
        lines.append(
            f"| {name} | {alone['ttft_p50_ms']:,.1f} / {alone['ttft_p99_ms']:,.1f} "
            f"| {beside['ttft_p50_ms']:,.1f} / {beside['ttft_p99_ms']:,.1f} "
            f"| {ratio:.1f} | {row['flood']['answers_per_s']:.1f} |"
        )
    return "\n".join(lines)


def _systems(folder: Path, options: argparse.Namespace) -> list[System]:
    def tenants(name: str, **limits: Any) -> str:
        path = folder / f"{name}.json"
        entries = [
            {"name": who, "keys": [hashlib.sha256(who.encode()).hexdigest()], **more}
            for who, more in (("other", {}), ("flood", limits))
        ]
        path.write_text(json.dumps(entries))
        return str(path)

    fair = ("--scalellm.scheduler.policy", "fair")
    choices = {
        "fcfs": ("--scalellm.frontend.tenants", tenants("free")),
        "fair": ("--scalellm.frontend.tenants", tenants("free"), *fair),
        "fair, limited": (
            *("--scalellm.frontend.tenants", tenants("limited", max_running=options.seats // 2)),
            *fair,
        ),
    }
    common = ("--max-num-seqs", str(options.seats), "--max-model-len", "2048", "--enforce-eager")
    return [
        System(name.replace(", ", "-"), name, ("scalellm",), (*common, *more))
        for name, more in choices.items()
    ]


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tenants", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=12.0, help="length of a part")
    parser.add_argument("--seats", type=int, default=8, help="sequences at a time")
    parser.add_argument("--flood", type=int, default=48, help="requests of the flood at a time")
    parser.add_argument("--tokens", type=int, default=32, help="of every answer")
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Start the servers in turn, measure, print the table."""
    arguments = sys.argv[1:] if argv is None else argv
    options = _options(arguments)
    exit_on_signals()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for system in _systems(folder, options):
            server = Server(system, Target(_DEMO, None, None), folder)
            try:
                server.start()
                server.wait_ready(_START_TIMEOUT_S, lambda _: None)
                results[system.summary] = asyncio.run(measure(server.port, options))
            finally:
                for note in server.stop():
                    print(note, file=sys.stderr)
    print(report(results))
    if options.output:
        command = " ".join(["tenants", *arguments])
        record = {"command": command, "results": results}
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
