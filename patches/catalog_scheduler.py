"""The patch that puts the lean step before vLLM's scheduler, as data."""

from __future__ import annotations

from .contracts import Target
from .entries import Patch

_SCHEDULER = "vllm.v1.core.sched.scheduler"
_ASYNC_SCHEDULER = "vllm.v1.core.sched.async_scheduler"
_REQUEST = "vllm.v1.request"

SCHEDULER_PATCHES: tuple[Patch, ...] = (
    Patch(
        name="lean_step",
        feature="scheduler",
        module="patch_config_scheduler",
        targets=(
            Target(
                module="vllm.config.scheduler",
                qualname="SchedulerConfig.get_scheduler_cls",
                parameters=(),
                is_async=False,
            ),
            Target(
                module="vllm.v1.engine.core",
                qualname="EngineCore.__init__",
                calls=("vllm_config.scheduler_config.get_scheduler_cls",),
            ),
            Target(
                module=_SCHEDULER,
                qualname="Scheduler.__init__",
                assigns=(
                    "self.requests",
                    "self.running",
                    "self.policy",
                    "self.scheduler_config",
                    "self.max_num_running_reqs",
                    "self.max_num_scheduled_tokens",
                    "self.max_model_len",
                    "self.prev_step_scheduled_req_ids",
                    "self.use_v2_model_runner",
                    "self.current_step",
                    "self.connector",
                    "self.ec_connector",
                    "self.perf_metrics",
                    "self.lora_config",
                    "self.is_encoder_decoder",
                ),
            ),
            Target(
                module=_SCHEDULER,
                qualname="Scheduler.schedule",
                parameters=("throttle_prefills",),
                is_async=False,
                calls=("self.kv_cache_manager.allocate_slots", "self._update_after_schedule"),
                reads=("self.running", "self.scheduler_config.max_num_batched_tokens"),
            ),
            Target(
                module=_SCHEDULER,
                qualname="Scheduler.update_from_output",
                parameters=("scheduler_output", "model_runner_output"),
                is_async=False,
                reads=(
                    "scheduler_output.num_scheduled_tokens",
                    "model_runner_output.sampled_token_ids",
                    "model_runner_output.req_id_to_index",
                ),
                calls=("self._update_request_with_output", "self.make_stats"),
            ),
            Target(
                module=_SCHEDULER,
                qualname="Scheduler._update_after_schedule",
                parameters=("scheduler_output",),
                assigns=("request.num_computed_tokens", "request.is_prefill_chunk"),
            ),
            Target(
                module=_ASYNC_SCHEDULER,
                qualname="AsyncScheduler._update_after_schedule",
                parameters=("scheduler_output",),
                assigns=("request.num_output_placeholders",),
            ),
            Target(
                module=_ASYNC_SCHEDULER,
                qualname="AsyncScheduler._update_request_with_output",
                parameters=("request", "new_token_ids", "is_stale"),
                assigns=("request.num_output_placeholders",),
                calls=("self.kv_cache_manager.cache_blocks",),
                vllm="<0.33",
            ),
            # Moved there, with the same effect on one token that is not stale.
            Target(
                module=_SCHEDULER,
                qualname="Scheduler._update_request_with_output",
                assigns=("request.num_output_placeholders",),
                vllm=">=0.33",
            ),
            Target(
                module=_SCHEDULER,
                qualname="Scheduler.update_from_output",
                calls=("self.kv_cache_manager.cache_blocks",),
                vllm=">=0.33",
            ),
            Target(
                module=_REQUEST,
                qualname="Request.__init__",
                assigns=(
                    "self.num_output_placeholders",
                    "self.num_computed_tokens",
                    "self.num_in_flight_tokens",
                    "self.is_prefill_chunk",
                    "self.prefill_stats",
                    "self.events",
                ),
            ),
            Target(
                module=_REQUEST,
                qualname="Request.append_output_token_ids",
                parameters=("token_ids",),
                calls=("self.update_block_hashes",),
            ),
        ),
        why="vLLM treats every request in every step as if anything could have happened to it",
        how="the scheduler's class is vLLM's with a base before it, which takes the requests that "
        "get one more token and nothing else, and leaves the rest of the step to vLLM's code",
        when="engine",
        remove_when="vLLM's scheduler costs a microsecond per running request and step",
    ),
)
