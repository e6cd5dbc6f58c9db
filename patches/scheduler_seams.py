"""Seams of the policies: what `scheduling/host.py` and `waiting.py` use of vLLM's scheduler.

Pure data. The patch that puts our scheduler in place is in `catalog_scheduler.py`.
"""

from __future__ import annotations

from .contracts import Target
from .seams import Seam

_SCHEDULER = "vllm.v1.core.sched.scheduler"
_CORE = "vllm.v1.engine.core"

SCHEDULER_SEAMS: tuple[Seam, ...] = (
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
            Target(
                module=_SCHEDULER,
                qualname="Scheduler.__init__",
                assigns=("self.waiting", "self.policy", "self.num_waiting_for_streaming_input"),
            ),
            Target(
                module=_SCHEDULER,
                qualname="Scheduler.finish_requests",
                parameters=("request_ids", "finished_status"),
                calls=("self.waiting.remove_requests", "self._free_request"),
            ),
        ),
    ),
    Seam(
        name="preemption",
        feature="scheduler",
        why="who has to give way is preempted before a step, as vLLM does it",
        targets=(
            Target(
                module=_SCHEDULER,
                qualname="Scheduler._preempt_request",
                parameters=("request", "timestamp"),
                calls=("self.waiting.prepend_request", "self.reset_preempted_req_ids.add"),
                assigns=("request.status", "request.num_stale_output_tokens"),
            ),
            Target(
                module=_SCHEDULER,
                qualname="Scheduler.schedule",
                reads=("self.reset_preempted_req_ids", "self.num_waiting_for_streaming_input"),
            ),
            Target(
                module=_SCHEDULER,
                qualname="Scheduler.__init__",
                assigns=("self.max_num_active_reqs",),
                vllm=">=0.31",
            ),
        ),
    ),
    Seam(
        name="refusals",
        feature="scheduler",
        why="a request that cannot make it ends with an output that says so, in the next step",
        targets=(
            Target(
                module="vllm.v1.engine",
                qualname="EngineCoreOutput",
                kind="class",
                constructed_with=("request_id", "new_token_ids", "finish_reason", "stop_reason"),
            ),
            # A request that has ended keeps the engine going for one step more.
            Target(
                module=_SCHEDULER,
                qualname="Scheduler.has_finished_requests",
                parameters=(),
                reads=("self.finished_req_ids",),
            ),
            Target(
                module=_CORE,
                qualname="EngineCore.step_with_batch_queue",
                calls=("self.scheduler.has_requests", "self.scheduler.update_from_output"),
            ),
        ),
    ),
)
