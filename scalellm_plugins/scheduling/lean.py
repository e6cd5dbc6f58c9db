"""A decode step in a few passes: vLLM's scheduler, which handles only what is not plain decoding.

vLLM's `schedule()` and `update_from_output()` treat every request as if anything could have
happened to it: 13 µs per running request and step. Of nearly all of them only this is true: one
more token, in a block that is there, and it does not end. Here one loop does that for the longest
prefix of `running` that it is true for, with the same changes to requests and blocks, and what is
left goes to vLLM's own code: `schedule()` sees the rest of `running` and what waits, with what is
left of the budgets; `update_from_output()` sees the requests that may end or have more to say than
a token. So policies, limits, preemption, prefixes and whatever a release adds stay vLLM's.

Why the prefix may be taken away: vLLM goes through `running` in order, and preempts from its end
up to the request that needs a block. A request of the prefix that finds no block ends the prefix.

Follows `vllm/v1/core/sched/scheduler.py` and `async_scheduler.py`; held to them step by step by
`tests/test_lean_lockstep.py`.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from scalellm_plugins import config
from scalellm_plugins.engine.plain import PlainOutputs
from scalellm_plugins.errors import ConfigError

from .host import PolicyHost, lowered
from .registry import make

logger = logging.getLogger("vllm.scalellm")

_RUNNING = RequestStatus.RUNNING
_NEVER = 1 << 62


class _Plan:
    """What a plain step must know of a request, so that it need not ask it."""

    __slots__ = (
        "before",
        "close",
        "end",
        "id",
        "known",
        "last",
        "mark",
        "output",
        "plain",
        "quiet",
        "silent",
        "stops",
        "structured",
        "uncached",
    )

    def __init__(self, request: Any, longest: int, uncached: int) -> None:
        self.id = request.request_id
        self.known = request._all_token_ids
        self.output = request._output_token_ids
        self.before = request.num_prompt_tokens - 1
        params = request.sampling_params
        self.plain = not (
            params is None
            or request.mm_features
            or request.resumable
            or request.prompt_embeds is not None
        )
        """Whether it is ever decoded plainly."""
        self.close = -1
        """With so many computed tokens `schedule` looks closely at it; -1: always."""
        self.mark = 0
        """With so many known tokens `update_from_output` does; 0: always."""
        self.quiet = False
        """Whether its outputs are tokens and nothing else for now, until it ends."""
        self.uncached = uncached
        """With so many computed tokens, a block more can be found by others."""
        if not self.plain:
            return
        self.last = request.num_prompt_tokens + request.max_tokens
        self.end = min(self.last, longest)
        """With so many tokens it ends."""
        self.stops = {params.eos_token_id, *(params.stop_token_ids or ())}
        self.structured = request.use_structured_output
        self.silent = not (
            self.structured
            or params.num_logprobs is not None
            or params.prompt_logprobs is not None
            or getattr(params, "repetition_detection", None) is not None
            or request.trace_headers is not None
            or getattr(request, "spec_decode_metrics", None) is not None
        )

    def disturb(self) -> None:
        """Something happened to the request: look at it closely."""
        self.close, self.mark, self.quiet = -1, 0, False


_STOP, _SKIP = object(), object()
"""Of a close look: the prefix ends before this request; it gets no token in this step."""


class LeanScheduler(Scheduler):  # type: ignore[misc]
    """See the module. This one is for synchronous scheduling."""

    sends_columns = False
    """Whether `EngineCoreOutputs.outputs` may be `PlainOutputs`: whoever takes them knows."""

    running: list[Any]
    scheduler_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM's code reads budgets from there; its own copy, so that nobody else sees them change.
        self.scheduler_config = copy.copy(self.scheduler_config)
        self._async = isinstance(self, AsyncScheduler)
        self._reason = obstacle(self)
        self._steps: dict[int, tuple[Any, list[Any], dict[str, int]]] = {}
        """id of a `SchedulerOutput` → itself, requests that it has plainly, vLLM's share of it."""
        self._ids: dict[int, list[str]] = {}
        """Client → ids of its last plain outputs."""
        self._host: PolicyHost | None = None
        self._follow(config.current())
        if self._reason:
            logger.info("scheduler: the lean step is off: %s", self._reason)
            return
        self._coordinator = self.kv_cache_manager.coordinator
        self._pool = self.kv_cache_manager.block_pool
        (self._manager,) = self._coordinator.single_type_managers
        self._blocks = self._manager.block_size
        self._hash_block = self._pool.hash_block_size
        self._cacheless = 0 if self._manager.enable_caching else _NEVER

    def _follow(self, options: config.Config) -> None:
        """Have a policy say who is next, and so on, where that is not what vLLM does anyway.

        Raises:
            ConfigError: vLLM was asked for another order, or the policy cannot be made.
        """
        own = options.scheduler
        tenants = options.frontend.tenants is not None
        if own.policy in (None, "fcfs") and own.tpot_target_ms is None and not tenants:
            return
        names = own.policy or "fcfs"
        if self.policy is not SchedulingPolicy.FCFS:
            if own.policy is None and own.tpot_target_ms is None:
                logger.info("scheduler: no limits of tenants with --scheduling-policy")
                return
            raise ConfigError(
                f"scalellm.scheduler.policy {names} and --scheduling-policy {self.policy.value}: "
                "both say who is next; leave one of them out"
            )
        self._host = PolicyHost(self, functools.partial(make, names), own, tenants=tenants)
        self.waiting = self._host.queue

    # Requests

    def add_request(self, request: Any) -> None:
        if not self._reason:
            request.scalellm_plan = _Plan(request, self.max_model_len, self._cacheless)
        host = self._host
        if host is None or request.request_id in self.requests:  # more input of a session
            super().add_request(request)
            return
        refused = host.arrive(request)
        super().add_request(request)
        if refused is not None:
            host.refuse(request, refused)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        if not self._reason:
            request.scalellm_plan.disturb()
        super()._preempt_request(request, *args, **kwargs)

    # Before the model

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """Return the next step's `SchedulerOutput`, as vLLM's would be."""
        if self._host is not None:
            return self._host.schedule(throttle_prefills)
        return self._schedule(throttle_prefills)

    def _schedule(self, throttle_prefills: bool) -> Any:
        if self._reason or throttle_prefills or not self._fits_now():
            return super().schedule(throttle_prefills)
        running = self.running
        number, requests, lists, flags = self._take_prefix(running)
        if not requests:
            return super().schedule(throttle_prefills)
        used = len(requests)
        missing = () if self.use_v2_model_runner else self._new_to_worker(lists[0])
        own = self.scheduler_config
        limits = [
            (self, "max_num_scheduled_tokens", used),
            (own, "max_num_batched_tokens", used),
            (self, "max_num_running_reqs", number),
        ]
        if hasattr(self, "max_num_active_reqs"):
            limits.append((self, "max_num_active_reqs", number))
        prefix = running[:number]
        self.running = running[number:]
        try:
            with lowered(limits):
                output = super().schedule(throttle_prefills)
        finally:
            self.running = prefix + self.running
        self._put_in(output, requests, lists, flags, missing)
        return output

    def _fits_now(self) -> bool:
        """Whether vLLM's code does the same with a part of the running requests, in this step."""
        own = self.scheduler_config
        if self.pause_state is PauseState.PAUSED_ALL or own.long_prefill_token_threshold:
            return False  # nothing runs; a limit depends on how much is left of the budget
        if len(self.running) > min(self.max_num_scheduled_tokens, own.max_num_batched_tokens):
            return False
        if self.policy is not SchedulingPolicy.PRIORITY:
            return True
        # It may preempt any of them: only if nothing has to be preempted.
        need = len(self.running) + own.max_num_batched_tokens // self._blocks
        return bool(self.kv_cache_manager.block_pool.get_num_free_blocks() >= need)

    def _take_prefix(self, running: list[Any]) -> tuple[int, list[Any], Any, Any]:
        """Schedule the prefix. Returns its length, those that got a token, and their columns."""
        if self._anchor:
            running = running[:-1]
        asynchronous = self._async
        eligible = (
            self.current_step + 1 + getattr(self, "decode_stagger", 1)
            if asynchronous and self.use_v2_model_runner
            else None
        )
        skipped = 0
        structured = pending = False
        requests: list[Any] = []
        ids: list[str] = []
        blocks: list[Any] = []
        computed_tokens: list[int] = []
        output_tokens: list[int] = []
        for request in running:
            plan = request.scalellm_plan
            computed = request.num_computed_tokens
            if computed < plan.close:
                blocks.append(None)
            else:
                new = self._look(request, plan, computed)
                if new is _STOP:
                    break
                if new is _SKIP:
                    skipped += 1
                    continue
                blocks.append(new)
                if plan.structured:
                    structured = True
                    pending |= asynchronous and request.num_output_placeholders > 0
            requests.append(request)
            ids.append(plan.id)
            computed_tokens.append(computed)
            output_tokens.append(computed - plan.before)
            request.num_computed_tokens = computed + 1
            request.num_in_flight_tokens += 1
            if asynchronous:
                request.num_output_placeholders += 1
                if eligible is not None:
                    request.next_decode_eligible_step = eligible
        lists = ids, blocks, computed_tokens, output_tokens
        return len(requests) + skipped, requests, lists, (structured, pending)

    def _look(self, request: Any, plan: _Plan, computed: int) -> Any:
        """Look closely at a request: its new blocks, None if it needs none, `_STOP` or `_SKIP`."""
        waiting = request.num_output_placeholders
        known = len(plan.known)
        if not plan.plain or request.is_prefill_chunk or known + waiting - computed != 1:
            return _STOP
        cap = self.max_model_len - 1
        if (waiting and computed + 2 - waiting >= plan.last) or computed >= cap:
            return _SKIP
        new = None
        size = self._blocks
        full = known >= plan.uncached
        if not computed % size:
            if not self._pool.get_num_free_blocks():
                return _STOP
            # `allocate_slots` does this, and much that can be left out for one token more.
            (blocks,) = self._coordinator.allocate_new_blocks(plan.id, computed + 1, computed + 1)
            new = ([block.block_id for block in blocks],) if blocks else None
        if full:
            self.kv_cache_manager.cache_blocks(request, known)
            self._note_cached(plan)
        if not plan.structured:
            # `known` may be as many as `computed + 1`: none of the above is true before.
            next_block = computed - computed % size + size
            plan.close = min(next_block, plan.last - 2, cap, plan.uncached - 1)
        return new

    @property
    def _anchor(self) -> bool:
        """Whether vLLM's code must see a running request: it keeps a watermark of blocks then."""
        return bool(self.kv_cache_manager.watermark_blocks)

    def _note_cached(self, plan: _Plan) -> None:
        cached = self._manager.num_cached_block.get(plan.id, 0)
        plan.uncached = (cached + 1) * self._blocks

    def _new_to_worker(self, ids: list[str]) -> list[str]:
        """Requests that were not in the step before: the worker is told all their tokens."""
        before = self.prev_step_scheduled_req_ids
        return [] if before.issuperset(ids) else [id_ for id_ in ids if id_ not in before]

    def _put_in(
        self, output: Any, requests: list[Any], lists: Any, flags: Any, missing: Sequence[str]
    ) -> None:
        """Put the prefix before vLLM's share of a step."""
        ids, blocks, computed_tokens, output_tokens = lists
        rest = output.num_scheduled_tokens
        self._steps[id(output)] = (output, requests, rest)
        if not rest and hasattr(self, "num_executed_steps"):
            self.num_executed_steps += 1  # 0.33 counts steps that schedule tokens
        output.num_scheduled_tokens = dict.fromkeys(ids, 1) | rest
        output.total_num_scheduled_tokens += len(ids)
        cached = output.scheduled_cached_reqs
        if not self.use_v2_model_runner:
            for id_ in missing:
                cached.all_token_ids[id_] = self.requests[id_].all_token_ids.copy()
            self.prev_step_scheduled_req_ids.update(ids)
        cached.req_ids = ids + cached.req_ids
        cached.new_block_ids = blocks + cached.new_block_ids
        cached.num_computed_tokens = computed_tokens + cached.num_computed_tokens
        cached.num_output_tokens = output_tokens + cached.num_output_tokens
        if output.num_common_prefix_blocks and self.running:
            # vLLM's code, until 0.31, asks the first that runs, and did not see it.
            first = self.running[0].request_id
            output.num_common_prefix_blocks = self.kv_cache_manager.get_num_common_prefix_blocks(
                first
            )
        structured, pending = flags
        if structured:
            output.has_structured_output_requests = True
            if pending:
                output.pending_structured_output_tokens = True

    # After it

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Apply a step's tokens; return `EngineCoreOutputs` by client index."""
        outputs: dict[int, Any] = self._update(scheduler_output, model_runner_output)
        if self._host is not None:
            self._host.updated(scheduler_output)
            for client, refused in self._host.take_refused():
                theirs = outputs.setdefault(client, EngineCoreOutputs())
                made = theirs.outputs
                (made.others if type(made) is PlainOutputs else made).append(refused)
        return outputs

    def _update(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        step = self._steps.pop(id(scheduler_output), None)
        if step is None:
            return super().update_from_output(scheduler_output, model_runner_output)
        _, requests, rest = step
        if not model_runner_output.sampled_token_ids or model_runner_output.num_nans_in_logits:
            return super().update_from_output(scheduler_output, model_runner_output)
        plain, left = self._apply(requests, model_runner_output)
        share = copy.copy(scheduler_output)
        share.num_scheduled_tokens = left | rest if rest else left
        outputs = super().update_from_output(share, model_runner_output)
        return self._joined(plain, outputs)

    def _apply(
        self, requests: list[Any], model_output: Any
    ) -> tuple[dict[int, Any], dict[str, int]]:
        """Give requests their tokens. Returns outputs by client, and whom vLLM's code must see."""
        sampled = model_output.sampled_token_ids
        row_of = model_output.req_id_to_index
        asynchronous = self._async
        plain: dict[int, tuple[list[str], list[int]]] = {}
        left: dict[str, int] = {}
        client = -1
        for request in requests:
            plan = request.scalellm_plan
            id_ = plan.id
            if request.status is not _RUNNING or not (plan.quiet or _is_quiet(request, plan)):
                left[id_] = 1
                continue
            new = sampled[row_of[id_]]
            known = plan.known
            number = len(known) + 1
            if len(new) != 1 or new[0] in plan.stops or number >= plan.end:
                left[id_] = 1
                continue
            token = new[0]
            known.append(token)
            plan.output.append(token)
            request.num_in_flight_tokens -= 1
            if asynchronous:
                request.num_output_placeholders -= 1
            if number >= plan.mark:
                self._note_blocks(request, plan, number)
            if request.client_index != client:
                client = request.client_index
                ids, tokens = plain.setdefault(client, ([], []))
            ids.append(id_)
            tokens.append(token)
        return plain, left

    def _note_blocks(self, request: Any, plan: _Plan, number: int) -> None:
        """Hash and cache what a request has filled with its token of that number."""
        block = self._hash_block
        if not number % block:
            request.update_block_hashes()
        plan.mark = number - number % block + block
        if self._async:
            computed = request.num_computed_tokens - request.num_output_placeholders
            if computed >= plan.uncached:
                self.kv_cache_manager.cache_blocks(request, computed)
                self._note_cached(plan)
            # `computed` is less than `number`: nothing to cache before.
            plan.mark = min(plan.mark, plan.uncached + 1)

    def _joined(self, plain: dict[int, Any], outputs: dict[int, Any]) -> dict[int, Any]:
        """Put plain outputs before vLLM's, and statistics with the first client's, as vLLM does."""
        if not plain:
            return outputs
        stats = None
        for theirs in outputs.values():
            if theirs.scheduler_stats is not None:
                stats, theirs.scheduler_stats = theirs.scheduler_stats, None
        joined = {}
        for client, (ids, tokens) in plain.items():
            theirs = outputs.pop(client, None)
            if theirs is None:
                theirs = EngineCoreOutputs()
            if self.sends_columns:
                last = self._ids.get(client)
                if ids == last:
                    ids = last  # the same list, so that nobody compares them again
                else:
                    self._ids[client] = ids
            made = PlainOutputs(ids, tokens, theirs.outputs, EngineCoreOutput)
            theirs.outputs = made if self.sends_columns else made.whole()
            joined[client] = theirs
        for client, theirs in outputs.items():
            if theirs.outputs or theirs.finished_requests is not None:
                joined[client] = theirs
        next(iter(joined.values())).scheduler_stats = stats
        return joined


def _is_quiet(request: Any, plan: _Plan) -> bool:
    plan.quiet = (
        plan.silent
        and request.prefill_stats is None
        and not request.events
        and not request.num_stale_output_tokens
    )
    return plan.quiet


def obstacle(scheduler: Any) -> str:
    """Why a scheduler cannot take the lean step; empty if it can."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    found = {
        "a KV or encoder-cache connector": scheduler.connector or scheduler.ec_connector,
        "LoRA": scheduler.lora_config,
        "speculative decoding": scheduler.vllm_config.speculative_config,
        "pipeline parallelism": scheduler.parallel_config.pipeline_parallel_size > 1,
        "an encoder-decoder model": scheduler.is_encoder_decoder,
        "a KV cache that is not full attention's alone": (
            [type(manager) for manager in managers] != [FullAttentionManager]
        ),
        "a model that does not sample one token per step": (
            getattr(scheduler, "num_sampled_tokens_per_step", 1) != 1
        ),
        "outputs beside tokens": (
            getattr(scheduler, "aux_output_connector", None)
            or getattr(scheduler, "return_sampling_mask", False)
            or getattr(scheduler, "is_mm_encoder_only", False)
        ),
        "performance metrics per step": scheduler.perf_metrics,
        "a prefill interval": getattr(scheduler, "local_prefill_interval", 1) > 1,
    }
    return ", ".join(name for name, value in found.items() if value)


class LeanAsyncScheduler(LeanScheduler, AsyncScheduler):  # type: ignore[misc]
    """The lean step before vLLM's scheduler for asynchronous scheduling."""


_LEAN: dict[type, type] = {AsyncScheduler: LeanAsyncScheduler, Scheduler: LeanScheduler}


def lean(chosen: type) -> type:
    """Return the lean form of a scheduler of vLLM's; any other class as it is."""
    return _LEAN.get(chosen, chosen)
