"""Seams of features that are not built yet, or in part: watched, so that they can be built.

A break of a planned feature's switches nothing off that exists today; `scalellm doctor` reports it,
and fails on it only under `--strict`. Pure data, like `seams.py`.
"""

from __future__ import annotations

from .contracts import Target
from .seams import Seam

_SCHEDULER = "vllm.v1.core.sched.scheduler"
_ASYNC_SCHEDULER = "vllm.v1.core.sched.async_scheduler"

SCHEDULER = (
    Seam(
        name="scheduler_class",
        feature="scheduler",
        why="one thin subclass of AsyncScheduler hosts the policies",
        targets=(
            Target(
                module="vllm.config.scheduler",
                qualname="SchedulerConfig.get_scheduler_cls",
                calls=("resolve_obj_by_qualname",),
            ),
            Target(
                module=_ASYNC_SCHEDULER,
                qualname="AsyncScheduler",
                kind="class",
                bases=("Scheduler", "SchedulerInterface"),
                implements=(),
            ),
            Target(
                module=_ASYNC_SCHEDULER,
                qualname="AsyncScheduler.schedule",
                parameters=("throttle_prefills",),
            ),
            Target(
                module=_ASYNC_SCHEDULER,
                qualname="AsyncScheduler.update_from_output",
                parameters=("scheduler_output", "model_runner_output"),
            ),
            Target(
                module=_ASYNC_SCHEDULER,
                qualname="AsyncScheduler.finish_requests",
                parameters=("request_ids", "finished_status"),
            ),
            Target(
                module=_ASYNC_SCHEDULER,
                qualname="AsyncScheduler._update_after_schedule",
                parameters=("scheduler_output",),
                assigns=("request.num_output_placeholders",),
            ),
            # Defined by AsyncScheduler itself until 0.33, which moved it into Scheduler.
            Target(
                module=_ASYNC_SCHEDULER,
                qualname="AsyncScheduler._update_request_with_output",
                parameters=("request", "new_token_ids", "is_stale"),
                assigns=("request.num_output_placeholders",),
            ),
            Target(
                module=_ASYNC_SCHEDULER,
                qualname="AsyncScheduler._preempt_request",
                parameters=("request", "timestamp"),
            ),
            # Pausing asks whether a request is known, from this release on.
            Target(
                module=_ASYNC_SCHEDULER,
                qualname="AsyncScheduler.has_request",
                parameters=("request_id",),
                vllm=">=0.33",
            ),
        ),
    ),
    Seam(
        name="scheduler_state",
        feature="scheduler",
        why="the lean decode step reads the scheduler's lists and makes its output",
        targets=(
            Target(
                module=_SCHEDULER,
                qualname="Scheduler.__init__",
                assigns=("self.requests", "self.running", "self.waiting", "self.policy"),
            ),
            Target(
                module=_SCHEDULER,
                qualname="Scheduler.__init__",
                assigns=("self.skipped_waiting",),
                vllm="<0.31",
            ),
            Target(
                module=_SCHEDULER,
                qualname="Scheduler.__init__",
                assigns=("self.kv_holding_waiting", "self.max_num_active_reqs"),
                vllm=">=0.31",
            ),
            Target(
                module="vllm.v1.core.sched.output",
                qualname="SchedulerOutput",
                kind="class",
                # num_common_prefix_blocks was required until 0.32 gave it a default.
                constructed_with=(
                    "scheduled_new_reqs",
                    "scheduled_cached_reqs",
                    "num_scheduled_tokens",
                    "total_num_scheduled_tokens",
                    "scheduled_spec_decode_tokens",
                    "scheduled_encoder_inputs",
                    "num_common_prefix_blocks",
                    "finished_req_ids",
                    "free_encoder_mm_hashes",
                ),
            ),
            Target(
                module="vllm.v1.core.sched.output",
                qualname="CachedRequestData",
                kind="class",
                constructed_with=(
                    "req_ids",
                    "resumed_req_ids",
                    "new_token_ids",
                    "all_token_ids",
                    "new_block_ids",
                    "num_computed_tokens",
                    "num_output_tokens",
                ),
            ),
        ),
    ),
    Seam(
        name="request_queue",
        feature="scheduler",
        why="a policy orders `Scheduler.waiting` through a queue of its own",
        targets=(
            Target(
                module="vllm.v1.core.sched.request_queue",
                qualname="RequestQueue",
                kind="class",
                implements=(
                    "add_request",
                    "pop_request",
                    "peek_request",
                    "prepend_request",
                    "prepend_requests",
                    "remove_request",
                    "remove_requests",
                    "__bool__",
                    "__len__",
                    "__iter__",
                ),
            ),
        ),
    ),
)

PLANNED: tuple[Seam, ...] = SCHEDULER
