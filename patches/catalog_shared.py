"""The patches that make what vLLM keeps per API server right across workers, as data."""

from __future__ import annotations

from .contracts import Target
from .entries import Patch

_CLIENT = "vllm.v1.engine.core_client"
_LOGGERS = "vllm.v1.metrics.loggers"
_MODELS = "vllm.entrypoints.openai.models.serving"

SHARED: tuple[Patch, ...] = (
    Patch(
        name="worker_stat_loggers",
        feature="frontend",
        module="patch_v1_metrics_loggers",
        targets=(
            Target(
                module=_LOGGERS,
                qualname="StatLoggerManager.__init__",
                keywords=("client_count",),
                assigns=("self.engine_indexes", "self.stat_loggers"),
            ),
            Target(
                module=_LOGGERS,
                qualname="StatLoggerManager.record",
                parameters=("scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
                is_async=False,
                calls=("stat_logger.record",),
            ),
            Target(
                module=_LOGGERS,
                qualname="LoggingStatLogger.record",
                parameters=("scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
                calls=("self._track_iteration_stats", "self.prefix_caching_metrics.observe"),
            ),
            Target(
                module=_LOGGERS,
                qualname="LoggingStatLogger._track_iteration_stats",
                reads=(
                    "iteration_stats.prompt_token_stats.computed",
                    "iteration_stats.num_generation_tokens",
                    "iteration_stats.num_corrupted_reqs",
                    "iteration_stats.num_preempted_reqs",
                ),
            ),
            Target(
                module=_LOGGERS,
                qualname="PerEngineStatLoggerAdapter.__init__",
                assigns=("self.per_engine_stat_loggers",),
            ),
            # Says when the engine sent the message that is recorded.
            Target(module=_CLIENT, qualname="AsyncMPClient.get_output_async", is_async=True),
        ),
        why="with several API servers vLLM logs no statistics, and a gauge is what the slowest of "
        "them heard last",
        how="the manager keeps its logging logger, fed with the sums over all workers in the first "
        "of them; while it records, gauges are stamped with the time of the engine's message",
        when="worker",
        remove_when="vLLM's API servers log one line together, and their gauges follow the engine",
    ),
    Patch(
        name="worker_loras",
        feature="frontend",
        module="patch_entrypoints_openai_models_serving",
        targets=(
            Target(
                module=_MODELS,
                qualname="OpenAIServingModels.__init__",
                assigns=("self.lora_requests", "self.lora_id_counter"),
            ),
            Target(
                module=_MODELS,
                qualname="OpenAIServingModels.init_static_loras",
                parameters=(),
                is_async=True,
                calls=("self.load_lora_adapter",),
            ),
            Target(
                module=_MODELS,
                qualname="OpenAIServingModels.load_lora_adapter",
                is_async=True,
                calls=("self.lora_id_counter.inc",),
                reads=("self.lora_requests",),
            ),
            Target(
                module=_MODELS,
                qualname="OpenAIServingModels.unload_lora_adapter",
                is_async=True,
                reads=("self.lora_requests",),
            ),
            Target(
                module=_MODELS,
                qualname="OpenAIServingModels.resolve_lora",
                is_async=True,
                calls=("self.lora_id_counter.inc",),
                reads=("self.lora_requests",),
            ),
        ),
        why="each API server of vLLM has its own adapters and gives out its own ids for them",
        how="the adapters become a view of one table that all workers share, changed under a lock",
        when="worker",
        remove_when="vLLM allows runtime LoRA updates with several API servers",
    ),
)
