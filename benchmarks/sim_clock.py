"""Is the simulated GPU's clock right, and what does it cost? A check to run before believing it.

    python -m scalellm_plugins.benchmarks.sim_clock [--gpu h200] [--model 8b] [--json FILE]

Drives the executor as EngineCore's batch queue does (submit step n + 1, then wait for step n) with
an engine that adds nothing, and compares when results arrive with the roofline. Run it on a quiet
machine: it measures the machine's timers too. Exits with 1 if any mean step is more than 2 % off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalellm_plugins.simulator.executor import SimulatedExecutor

TOLERANCE = 0.02
"""Largest error of a mean step, as a fraction of the roofline's."""

PROMPT = 256
"""Prompt tokens of each sequence."""


@dataclass
class Result:
    """One batch size. Times in µs unless they say otherwise."""

    sequences: int
    steps: int
    roofline_ms: float
    measured_ms: float
    error_percent: float
    """Of the mean interval between results."""
    median_error_percent: float
    """Of the median interval between results."""
    late_p50: float
    """How long after a step's deadline its result was there."""
    late_p99: float
    layout_cpu: float
    """CPU per step of `execute_model` and `sample_tokens`."""
    wait_cpu: float
    """CPU per step of waiting: the system call that sleeps, and the spin after it."""
    cpu_per_token: float


def build(gpu: str, model: str) -> SimulatedExecutor:
    """The executor as EngineCore has it, without an engine: only what it reads of the config."""
    from scalellm_plugins import config
    from scalellm_plugins.simulator.executor import SimulatedExecutor

    config.raw_to_env({"sim": {"gpu": gpu, "model": model}})
    model_config = SimpleNamespace(
        model="",
        tokenizer=None,
        hf_text_config=SimpleNamespace(eos_token_id=None),
        get_vocab_size=lambda: 128256,
        try_get_generation_config=dict,
    )
    vllm_config = SimpleNamespace(
        model_config=model_config,
        cache_config=SimpleNamespace(block_size=16, gpu_memory_utilization=0.9),
        lora_config=None,
        load_config=None,
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        scheduler_config=None,
        device_config=None,
        speculative_config=None,
        observability_config=None,
    )
    return SimulatedExecutor(vllm_config)


class EmptyEngine:
    """Schedules `sequences` decodes for ever, as cheaply as that can be done."""

    def __init__(self, executor: SimulatedExecutor, sequences: int) -> None:
        self.ids = [f"request-{i}" for i in range(sequences)]
        self.outputs = 0
        for id_ in self.ids:
            executor.requests.add(id_, PROMPT, None)
        self._ones = dict.fromkeys(self.ids, 1)

    def schedule(self) -> Any:
        """The next step's `SchedulerOutput`."""
        from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

        count = len(self.ids)
        self.outputs += 1
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = self._ones
        output.total_num_scheduled_tokens = count
        cached = CachedRequestData.make_empty()
        cached.req_ids = self.ids
        cached.num_computed_tokens = [PROMPT + self.outputs - 1] * count
        cached.num_output_tokens = [self.outputs] * count
        output.scheduled_cached_reqs = cached
        return output


def measure(executor: SimulatedExecutor, sequences: int, steps: int) -> Result:
    """Run `steps` steps of `sequences` decodes in real time."""
    engine = EmptyEngine(executor, sequences)
    cpu = time.thread_time
    layout = wait = 0.0
    expected: list[float] = []
    arrivals: list[float] = []
    deadlines: list[float] = []
    queue: deque[tuple[Future[Any], float]] = deque()
    warm_up = 20
    for number in range(steps + warm_up):
        scheduled = engine.schedule()
        started = cpu()
        busy = executor.timeline.busy_s
        executor.execute_model(scheduled, non_block=True)
        future = executor.sample_tokens(None, non_block=True)
        layout += cpu() - started
        expected.append(executor.timeline.busy_s - busy)
        queue.append((future, executor.timeline.free_at))
        if len(queue) == 2:
            oldest, deadline = queue.popleft()
            started = cpu()
            oldest.result()
            arrivals.append(time.monotonic())
            wait += cpu() - started
            deadlines.append(deadline)
        if number == warm_up:
            layout = wait = 0.0
    return _result(sequences, arrivals[warm_up:], deadlines[warm_up:], expected, layout, wait)


def _result(
    sequences: int,
    arrivals: list[float],
    deadlines: list[float],
    expected: list[float],
    layout: float,
    wait: float,
) -> Result:
    steps = len(arrivals) - 1
    # Result i arrives when step i ends, so interval i is step i + 1's time.
    roofline = expected[-steps - 1 : -1]
    intervals = sorted(b - a for a, b in itertools.pairwise(arrivals))
    late = sorted(a - d for a, d in zip(arrivals, deadlines, strict=True))
    mean = sum(roofline) / steps
    measured = (arrivals[-1] - arrivals[0]) / steps
    middle = sorted(roofline)[steps // 2]
    return Result(
        sequences=sequences,
        steps=steps,
        roofline_ms=mean * 1e3,
        measured_ms=measured * 1e3,
        error_percent=100 * (measured / mean - 1),
        median_error_percent=100 * (intervals[steps // 2] / middle - 1),
        late_p50=late[steps // 2] * 1e6,
        late_p99=late[int(steps * 0.99)] * 1e6,
        layout_cpu=layout / steps * 1e6,
        wait_cpu=wait / steps * 1e6,
        cpu_per_token=(layout + wait) / steps / sequences * 1e6,
    )


HEADER = (
    "| sequences | roofline ms | measured ms | error | median error | late p50 / p99 µs "
    "| CPU layout + wait µs/step | CPU µs/token |"
)


def row(result: Result) -> str:
    """One line of the table."""
    r = result
    return (
        f"| {r.sequences} | {r.roofline_ms:.3f} | {r.measured_ms:.3f} | {r.error_percent:+.2f} % "
        f"| {r.median_error_percent:+.2f} % | {r.late_p50:.0f} / {r.late_p99:.0f} "
        f"| {r.layout_cpu:.1f} + {r.wait_cpu:.1f} | {r.cpu_per_token:.2f} |"
    )


def main(argv: list[str] | None = None) -> int:
    """The command line above."""
    parser = argparse.ArgumentParser(prog="sim_clock", description="Check the simulated GPU.")
    parser.add_argument("--gpu", default="h200", help="as scalellm.sim.gpu")
    parser.add_argument("--model", default="8b", help="as scalellm.sim.model")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=500, help="steps per batch size")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args(argv)
    results = []
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    for sequences in args.sequences:
        # A new executor each time: no request of the last batch, no learnt sleep margin.
        results.append(measure(build(args.gpu, args.model), sequences, args.steps))
        print(row(results[-1]), flush=True)
    off = [r for r in results if abs(r.error_percent) > 100 * TOLERANCE]
    if args.json:
        document = {
            "benchmark": "sim_clock",
            "gpu": args.gpu,
            "model": args.model,
            "tolerance_percent": 100 * TOLERANCE,
            "passed": not off,
            "results": [asdict(r) for r in results],
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"{'FAILED' if off else 'passed'}: mean step within {TOLERANCE:.0%} of the roofline")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
