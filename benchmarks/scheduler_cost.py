"""What a decode step costs in the scheduler: vLLM's, and the same with the lean step before it.

    python -m scalellm_plugins.benchmarks.scheduler_cost [--running 64,128,256] [--rounds N]

No model, no engine. Requests with prompts of 128 tokens are decoded, prefix caching on, one step
under way beside the one that is scheduled (asynchronous scheduling) or none (synchronous). Each
request gets a token per step and none ends. `schedule()` and `update_from_output()` are timed
apart, in µs per running request and step; the schedulers take turns, a round each.

"lean" makes vLLM's objects for the outputs, "columns" what the shared-memory layer takes instead.
With `--arrivals P` a new request comes, and the oldest is aborted, in P percent of the steps.
With `--policies fair,priority` there is a row for each, as "columns" with that policy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import statistics
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalellm_plugins import config

PROMPT, LONGEST = 128, 4096


def main() -> None:
    """Measure, print a table, write JSON if asked for."""
    parser = argparse.ArgumentParser(
        prog="scheduler_cost",
        description="What a decode step costs in vLLM's scheduler and in the lean one.",
    )
    parser.add_argument("--running", default="64,128,256", help="requests")
    parser.add_argument("--rounds", type=int, default=5, help="of each scheduler")
    parser.add_argument("--steps", type=int, default=200, help="that are timed, per round")
    parser.add_argument("--arrivals", type=float, default=0.0, help="per 100 steps")
    parser.add_argument("--policies", default="", help="of ours, to measure beside them")
    parser.add_argument("--sync", action="store_true", help="synchronous scheduling")
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    results = {}
    print("| running | scheduler | schedule | update | both | ratio |\n|---|---|---|---|---|---|")
    for running in map(int, options.running.split(",")):
        found = measure(running, options)
        results[running] = found
        base = sum(found["vllm"].values())
        for name, times in found.items():
            both = sum(times.values())
            row = [f"{value:.2f}" for value in (*times.values(), both, both / base)]
            print(f"| {running} | {name} | {' | '.join(row)} |", flush=True)
    if options.output:
        record = {
            "command": f"scheduler_cost --running {options.running} "
            f"--rounds {options.rounds} --steps {options.steps} --arrivals {options.arrivals}"
            f"{f' --policies {options.policies}' if options.policies else ''}"
            f"{' --sync' if options.sync else ''}",
            "us_per_request_and_step": results,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n")


def measure(running: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return medians of the rounds: scheduler → {schedule, update} in µs per request and step."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from scalellm_plugins.scheduling.lean import lean

    upstream = Scheduler if options.sync else AsyncScheduler
    kinds = {"vllm": (upstream, False), "lean": (lean(upstream), False)}
    kinds["columns"] = (lean(upstream), True)
    policies = [name for name in options.policies.split(",") if name]
    kinds |= {name: (lean(upstream), True) for name in policies}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for number in range(options.rounds):
        for name, (kind, columns) in kinds.items():
            with _policy(name if name in policies else None):
                times[name].append(_round(kind, columns, running, options, number))
    return {
        name: {
            "schedule": statistics.median(one for one, _ in pairs),
            "update": statistics.median(one for _, one in pairs),
        }
        for name, pairs in times.items()
    }


@contextlib.contextmanager
def _policy(name: str | None) -> Iterator[None]:
    """Have schedulers that are made now follow a policy."""
    before = config.raw_from_env()
    config.raw_to_env({"scheduler": {"policy": name}} if name else {})
    try:
        yield
    finally:
        config.raw_to_env(before)


def _round(
    kind: Any, columns: bool, running: int, options: argparse.Namespace, seed: int
) -> tuple[float, float]:
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import RequestStatus

    from .schedulers import request, scheduler

    dice = random.Random(seed)
    blocks = (running + 64) * (PROMPT + options.steps + 64) // 16
    one = scheduler(kind, not options.sync, blocks=blocks, longest=LONGEST, sequences=running)
    if columns:
        one.sends_columns = True
    made = 0

    def arrive() -> None:
        nonlocal made
        prompt = [dice.randrange(1000) for _ in range(PROMPT)]
        one.add_request(request(f"chatcmpl-{made:016x}", prompt, LONGEST - PROMPT, ignore_eos=True))
        made += 1

    for _ in range(running):
        arrive()
    warm = 2 + running * PROMPT // 8192 + 20
    under_way: deque[Any] = deque()
    spent = [0.0, 0.0]
    for step in range(warm + options.steps):
        timed = step >= warm
        if timed and dice.random() * 100 < options.arrivals:
            one.finish_requests(one.running[0].request_id, RequestStatus.FINISHED_ABORTED)
            arrive()
        started = time.perf_counter()
        output = one.schedule()
        if timed:
            spent[0] += time.perf_counter() - started
        under_way.append(output)
        if len(under_way) < (1 if options.sync else 2):
            continue
        done = under_way.popleft()
        names = list(done.num_scheduled_tokens)
        sampled = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: number for number, name in enumerate(names)},
            sampled_token_ids=[[7 + (step + number) % 900] for number in range(len(names))],
        )
        started = time.perf_counter()
        one.update_from_output(done, sampled)
        if timed:
            spent[1] += time.perf_counter() - started
    return tuple(total / options.steps / running * 1e6 for total in spent)


if __name__ == "__main__":
    main()
