"""What a server costs that has nothing to do: share of a core, by process.

    python -m scalellm_plugins.benchmarks.idle_cost [--seconds S]

vLLM's server and ours, one after the other, on the demo model and the simulated GPU. Each answers
one request, rests for a few seconds and is then measured.
"""

from __future__ import annotations

import argparse
import http.client
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from . import procstat
from .server import Server, exit_on_signals
from .systems import BUILT_IN, SERVED_NAME, System, Target

_DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
_REST_S = 5.0


def measure(system: System, seconds: float) -> dict[str, float]:
    """Return percent of a core by process title."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(system, Target(_DEMO, gpu="h200", preset="8b"), Path(folder))
        try:
            server.start()
            server.wait_ready(600.0, lambda _seconds: None)
            _ask(server)
            time.sleep(_REST_S)
            pids = server.processes()
            before = {pid: procstat.cpu_seconds(pid) for pid in pids}
            time.sleep(seconds)
            used = {pid: procstat.cpu_seconds(pid) - before[pid] for pid in pids}
            titles = {pid: procstat.title(pid).split(" ")[0].rpartition("/")[2] for pid in pids}
        finally:
            server.stop()
    found: dict[str, float] = {}
    for pid, spent in used.items():
        found[titles[pid]] = round(found.get(titles[pid], 0.0) + spent / seconds * 100, 3)
    return found


def _ask(server: Server) -> None:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    body = json.dumps({"model": SERVED_NAME, "prompt": "Hi", "max_tokens": 4})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    assert connection.getresponse().status == 200
    connection.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m scalellm_plugins.benchmarks.idle_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="that are measured")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args(argv)
    exit_on_signals()
    results = {}
    print("| system | process | % of a core |\n|---|---|---|")
    for name in ("vllm", "scalellm"):
        results[name] = measure(BUILT_IN[name], options.seconds)
        for title, share in results[name].items():
            print(f"| {name} | {title} | {share:.2f} |", flush=True)
    if options.output:
        record = {"command": f"idle_cost --seconds {options.seconds}", "percent": results}
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
