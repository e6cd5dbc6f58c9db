"""Seams of `scalellm simulate`: vLLM's engine in this process, stepped by us, and its clocks.

Pure data. The executor under it is the simulated GPU's (seams.py).
"""

from __future__ import annotations

from .contracts import Target
from .seams import Seam

_CORE = "vllm.v1.engine.core"
_SCHEDULER = "vllm.v1.core.sched.scheduler"

VIRTUAL: tuple[Seam, ...] = (
    Seam(
        name="engine_in_virtual_time",
        feature="sim",
        why="a simulation steps vLLM's own engine, as its busy loop does",
        targets=(
            Target(
                module=_CORE,
                qualname="EngineCore.__init__",
                parameters=("vllm_config", "executor_class", "log_stats"),
                assigns=(
                    "self.model_executor",
                    "self.scheduler",
                    "self.batch_queue",
                    "self.step_fn",
                ),
            ),
            Target(module=_CORE, qualname="EngineCore.post_step", parameters=("model_executed",)),
            Target(
                module=_CORE,
                qualname="EngineCore.preprocess_add_request",
                parameters=("request",),
                is_async=False,
            ),
            Target(
                module=_CORE,
                qualname="EngineCore.add_request",
                parameters=("request", "request_wave"),
            ),
            # The loop that `virtual/engine.py` follows, its pause included.
            Target(
                module=_CORE,
                qualname="EngineCoreProc._process_engine_step",
                calls=("self.step_fn", "self.post_step", "time.sleep"),
            ),
            Target(
                module="vllm.engine.arg_utils",
                qualname="EngineArgs.create_engine_config",
                parameters=("usage_context",),
            ),
            Target(
                module="vllm.v1.engine",
                qualname="EngineCoreRequest",
                kind="class",
                constructed_with=(
                    "request_id",
                    "prompt_token_ids",
                    "mm_features",
                    "sampling_params",
                    "pooling_params",
                    "arrival_time",
                    "lora_request",
                    "cache_salt",
                    "data_parallel_rank",
                    "priority",
                ),
            ),
        ),
    ),
    Seam(
        name="scheduler_in_virtual_time",
        feature="sim",
        why="a simulation reads what runs, blocks in use and preemptions, and replaces the clock",
        targets=(
            Target(
                module=_SCHEDULER,
                qualname="Scheduler.__init__",
                assigns=("self.running", "self.kv_cache_manager"),
            ),
            Target(
                module=_SCHEDULER,
                qualname="Scheduler.schedule",
                calls=("time.monotonic",),
            ),
            Target(
                module="vllm.v1.core.kv_cache_manager",
                qualname="KVCacheManager.usage",
                binding="property",
            ),
            Target(
                module="vllm.v1.core.block_pool",
                qualname="BlockPool.get_num_free_blocks",
                parameters=(),
            ),
            Target(
                module="vllm.v1.request",
                qualname="Request.__init__",
                assigns=("self.num_preemptions",),
            ),
            Target(
                module="vllm.v1.request",
                qualname="Request.num_output_tokens",
                binding="property",
            ),
        ),
    ),
)
