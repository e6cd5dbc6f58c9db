"""vLLM's engine on the simulated GPU, in virtual time.

Nothing of the engine is imitated: `EngineCore` is vLLM's own class with this package's plugins, in
this process, and its own `step_fn` orders scheduling, submitting and waiting (asynchronously, step
n + 1 is scheduled while step n is on the device). What is replaced is the clock: waiting for a
step moves it. Around the steps is what `EngineCoreProc.run_busy_loop` does: take in all that has
arrived, step, and pause for a millisecond when nothing ran. CPU time is not simulated: scheduling,
like HTTP, takes no time at all.
"""

from __future__ import annotations

import gc
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore

from scalellm_plugins.engine.plain import PlainOutputs
from scalellm_plugins.errors import ScaleLLMError
from scalellm_plugins.simulator.model_dir import shape_of
from scalellm_plugins.simulator.roofline import model_preset
from scalellm_plugins.simulator.timeline import VirtualClock

from .clock import WALL_ORIGIN, VirtualTime, install
from .collect import Collector
from .job import Engine, Job, Request, Run, Settings
from .workload import prompt_ids

IDLE_PAUSE_S = 0.001
"""What `EngineCoreProc._process_engine_step` sleeps when nothing ran though requests are there."""

_SAID = ("tenant", "weight", "ttft_ms", "tpot_ms", "deadline_ms")
"""What a request says of itself among vLLM's extra arguments, each after `scalellm_`."""

STUCK_AFTER_S = 600.0
"""Virtual seconds without a step after which requests that are there will never run."""

Progress = Callable[[int, float], None]
"""Is told, after every step, how many requests have ended and what time it is."""


class StuckError(ScaleLLMError):
    """A scheduler leaves requests waiting for ever."""


class VirtualEngine:
    """One engine, for one run. The process's environment must already name the plugins."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.clock = VirtualClock()
        self.core = _core(job, self.clock)
        self.scheduler = self.core.scheduler
        self.collector = Collector(job.requests)
        if job.policy.ours:
            self._check_is_ours()
            self.scheduler.sends_columns = True  # `_take` knows them
        self._watch_steps()
        install(VirtualTime(self.clock), [*_policy_modules(self.scheduler)])

    def _check_is_ours(self) -> None:
        from scalellm_plugins.scheduling.lean import LeanScheduler

        if not isinstance(self.scheduler, LeanScheduler):
            raise ScaleLLMError(
                f"policy {self._job.policy.label}: the scheduler is vLLM's own "
                f"{type(self.scheduler).__name__}: `scalellm doctor --feature scheduler` says why"
            )

    def _watch_steps(self) -> None:
        """See what is new in a step when the executor is given it."""
        executor, clock, collector = self.core.model_executor, self.clock, self.collector
        original = executor.execute_model

        def execute_model(output: Any, non_block: bool = False) -> Any:
            if output.scheduled_new_reqs:
                new = [request.req_id for request in output.scheduled_new_reqs]
                collector.scheduled(new, clock.now())
            return original(output, non_block)

        executor.execute_model = execute_model

    def run(self, progress: Progress) -> Run:
        """Serve the whole workload.

        Raises:
            StuckError: requests are there and nothing runs any more.
        """
        gc.collect()
        gc.freeze()
        core, clock, scheduler = self.core, self.clock, self.scheduler
        manager = scheduler.kv_cache_manager
        collector = self.collector
        coming = list(enumerate(self._job.requests))[::-1]
        steps, stepped_at = 0, 0.0
        while True:
            now = clock.now()
            while coming and coming[-1][1].at <= now:
                self._add(*coming.pop())
            if not (scheduler.has_requests() or core.batch_queue):
                if not coming:
                    break
                clock.sleep_until(stepped_at := coming[-1][1].at)
                continue
            outputs, executed = core.step_fn()
            core.post_step(executed)
            now = clock.now()
            if executed:
                steps, stepped_at = steps + 1, now
            if outputs:
                self._take(outputs, now)
                collector.step(now, scheduler.running, manager.usage)
                progress(collector.ended, now)
            if not executed and scheduler.has_requests():
                clock.sleep_until(now + IDLE_PAUSE_S)
                if now - stepped_at > STUCK_AFTER_S:
                    raise self._stuck(now)
        return self._result(steps)

    def _stuck(self, now: float) -> StuckError:
        return StuckError(
            f"policy {self._job.policy.label}: {len(self.collector.alive)} requests wait since "
            f"{now - STUCK_AFTER_S:.0f} s and none is scheduled"
        )

    def _add(self, number: int, request: Request) -> None:
        made, wave = self.core.preprocess_add_request(engine_request(number, request))
        self.collector.add(made.request_id, made)
        self.core.add_request(made, wave)

    def _take(self, outputs: dict[int, Any], now: float) -> None:
        collector = self.collector
        for message in outputs.values():
            some = message.outputs
            if type(some) is PlainOutputs:
                collector.plain(some.ids)
                some = some.others
            for output in some:
                collector.output(output, now)

    def _result(self, steps: int) -> Run:
        import vllm

        scheduler, collector = self.scheduler, self.collector
        config, pool = self.core.vllm_config, scheduler.kv_cache_manager.block_pool
        blocks = config.cache_config.num_gpu_blocks
        last = [record.last for record in collector.records if record.last is not None]
        return Run(
            engine=Engine(
                vllm=vllm.__version__,
                scheduler=type(scheduler).__name__,
                max_num_seqs=config.scheduler_config.max_num_seqs,
                max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
                kv_blocks=blocks,
                block_size=config.cache_config.block_size,
            ),
            records=collector.records,
            tenants=collector.tenants,
            samples=collector.samples,
            seconds=max(last, default=0.0),
            steps=steps,
            busy_s=self.core.model_executor.timeline.busy_s,
            tokens=collector.tokens,
            kv_mean=collector.kv_mean,
            kv_max=collector.kv_max,
            # One block is vLLM's placeholder and never free.
            kv_left=blocks - 1 - pool.get_num_free_blocks(),
            gap=collector.gaps.worst,
        )


def engine_request(number: int, request: Request) -> EngineCoreRequest:
    """Return the workload's request `number` as the frontend would send it to the engine."""
    from vllm import SamplingParams

    said = {f"scalellm_{name}": getattr(request, name) for name in _SAID}
    return EngineCoreRequest(
        request_id=str(number),
        prompt_token_ids=prompt_ids(number, request),
        mm_features=None,
        sampling_params=SamplingParams(
            max_tokens=request.output,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args={key: value for key, value in said.items() if value is not None},
        ),
        pooling_params=None,
        arrival_time=WALL_ORIGIN + request.at,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        priority=request.priority,
    )


def _core(job: Job, clock: VirtualClock) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor.abstract import Executor

    from scalellm_plugins.simulator.executor import SimulatedExecutor

    SimulatedExecutor.clock = clock
    given = job.settings
    with tempfile.TemporaryDirectory(prefix="scalellm-simulate-") as folder:
        shape = shape_of(model_preset(given.model, given.tensor_parallel))
        (Path(folder) / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        arguments = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            enforce_eager=True,
            disable_log_stats=False,
            scheduling_policy=job.policy.order,
            **_limits(given),
        )
        # As in a server: vLLM's default budgets depend on it.
        config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
        virtual = VirtualTime(clock)
        install(virtual)
        core = EngineCore(config, Executor.get_class(config), log_stats=True)
        install(virtual)  # modules that only the scheduler and its policy brought in
    logging.getLogger("vllm").setLevel(logging.WARNING)
    return core


def _limits(given: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {
        "max_model_len": given.max_model_len,
        "enable_prefix_caching": given.prefix_caching,
    }
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if (value := getattr(given, name)) is not None:
            found[name] = value
    return found


def _policy_modules(scheduler: Any) -> Sequence[str]:
    """Modules of a scheduler's class that are neither vLLM's nor ours."""
    return [kind.__module__ for kind in type(scheduler).__mro__ if kind.__module__ != "builtins"]
