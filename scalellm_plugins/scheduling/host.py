"""What a policy says, done in vLLM's scheduler.

Around each of its steps, never within: who waits stands in the policy's order (`PolicyQueue`); who
has to give way is preempted before the step, as vLLM itself preempts for a reset; who rests is out
of `running` while vLLM looks at it; who cannot make it any more ends with an error that says why;
and a step takes no more of prompts than the budget for them. What vLLM does in between stays its
own. Where a policy has none of these, nothing of it is computed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.request import RequestStatus

from scalellm_plugins.errors import TermError

from .budget import PrefillBudget
from .cached_prefix import cached_tokens
from .policy import Engine, Policy, Work
from .refused import Refused
from .requests import RequestWork
from .step_times import StepTimes
from .tenancy import Tenancy
from .terms import Terms
from .waiting import PolicyQueue

if TYPE_CHECKING:
    from scalellm_plugins.config import SchedulerConfig

logger = logging.getLogger("vllm.scalellm")

LOOK_S = 0.25
"""How often all that wait are looked at for who cannot make it any more, 7 µs each. Whose turn may
come in a step is looked at in every one."""

AT_ONCE = 32
"""Requests for which room is made in one step, at most."""


class PolicyHost:
    """One scheduler's policy.

    Args:
        scheduler: a `LeanScheduler`.
        make: makes the policy of an `Engine` and the options.
        options: the section `scheduler`.
        tenants: whether requests may bring limits of their tenants.
    """

    def __init__(
        self,
        scheduler: Any,
        make: Callable[[Engine, SchedulerConfig], Policy],
        options: SchedulerConfig,
        *,
        tenants: bool = False,
    ) -> None:
        self._scheduler = scheduler
        pool = scheduler.kv_cache_manager.block_pool
        own = scheduler.scheduler_config
        self.times = StepTimes()
        engine = Engine(
            seats=scheduler.max_num_running_reqs,
            step_tokens=scheduler.max_num_scheduled_tokens,
            blocks=pool.num_gpu_blocks - 1,  # one is vLLM's, for padding
            block_tokens=scheduler.block_size,
            times=self.times,
        )
        self._pool = pool
        self._locality = options.locality_tokens > 0
        self._block = scheduler.block_size
        self.policy: Policy = make(engine, options)
        target = options.tpot_target_ms
        self._budget: PrefillBudget | None = None
        if target is not None or self.policy.paces:
            if own.enable_chunked_prefill:
                self._budget = PrefillBudget(None if target is None else target / 1e3, engine)
            elif target is not None:
                logger.warning("scheduler.tpot_target_ms: no effect, as prompts are not chunked")
        self._works: dict[str, RequestWork] = {}
        self.tenancy = Tenancy(scheduler, self._works) if tenants else None
        self.queue = PolicyQueue(self.policy, self._work_of, self._account, self.tenancy)
        self._looked = 0.0
        self._refused: list[tuple[int, Any]] = []
        self._new: list[RequestWork] = []
        """Of those that have begun to run, who has no token yet."""
        self._learns = self._budget is not None or self.policy.gives_up or self.policy.yields
        self._under_way: deque[tuple[int, tuple[int, int, int], float]] = deque()
        """Steps whose results are to come: `id` of its output, what is in it, when it began."""
        self._ended_at = 0.0

    # Requests

    def _work_of(self, request: Any) -> RequestWork:
        return self._works[request.request_id]

    def arrive(self, request: Any) -> Refused | None:
        """Look at a request before the scheduler gets it; why it is to be refused, if it is."""
        terms, refused = Terms(), None
        try:
            terms = Terms.of(getattr(request.sampling_params, "extra_args", None))
        except TermError as error:  # our own frontend has looked before; vLLM's does not
            refused = Refused(400, str(error))
        now = time.monotonic()
        work = self._works[request.request_id] = RequestWork(request, terms, now)
        if self._locality:
            work.cached = cached_tokens(self._scheduler.kv_cache_manager, request)
        if refused is None and self.tenancy is not None:
            refused = self.tenancy.arrived(work, now)
        return refused

    def refuse(self, request: Any, refused: Refused) -> None:
        """End a request of which nothing was made, and tell its client why."""
        self._scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
        output = EngineCoreOutput(
            request.request_id,
            [],
            finish_reason=FinishReason.ERROR,
            stop_reason=refused.reason(),
        )
        self._refused.append((request.client_index, output))

    def take_refused(self) -> list[tuple[int, Any]]:
        """Outputs of requests that were refused since the last time, by client."""
        taken, self._refused = self._refused, []
        return taken

    def _account(self, now: float) -> None:
        self.policy.account([self._works[one.request_id] for one in self._scheduler.running], now)

    def _forget(self, request_ids: Sequence[str], now: float) -> None:
        for id_ in request_ids:
            work = self._works.pop(id_, None)
            if work is not None:
                self.policy.account((work,), now)
                self.policy.ended(work, now)
                self.queue.forget(id_)
                if self.tenancy is not None:
                    self.tenancy.ended(work, now)

    # A step

    def schedule(self, throttle_prefills: bool) -> Any:
        """Return the next step's `SchedulerOutput`."""
        scheduler, policy = self._scheduler, self.policy
        now = time.monotonic()
        self.queue.begin(now)
        if self._new:
            self._note_first_tokens(now)
        if policy.gives_up and len(self.queue):
            self._give_up(now)
        tenancy = self.tenancy
        if tenancy is not None:
            self._preempt(tenancy.begin(now), now)
        if len(self.queue) and (policy.preempts or (tenancy is not None and tenancy.has_floors)):
            self._make_room(now)
        works: list[RequestWork] = []
        if policy.yields or policy.paces:
            works = [self._works[one.request_id] for one in scheduler.running]
        with contextlib.ExitStack() as stack:
            if self._budget is not None:
                stack.enter_context(self._prompts_limited(self._budget, works, now))
            if policy.yields and works:
                stack.enter_context(self._resting(works, now))
            output = scheduler._schedule(throttle_prefills)
        self._note(output, now)
        return output

    def _note(self, output: Any, now: float) -> None:
        """Take note of what a step has begun and what has ended before it."""
        if output.scheduled_new_reqs or output.scheduled_cached_reqs.resumed_req_ids:
            self._new += [self._works[one.req_id] for one in output.scheduled_new_reqs]
            if self.policy.ranks:
                rank, works = self.policy.rank, self._works
                # vLLM preempts from the end when it runs out of blocks.
                self._scheduler.running.sort(key=lambda one: rank(works[one.request_id], now))
        if output.finished_req_ids:
            self._forget(output.finished_req_ids, now)
        if self._learns and output.total_num_scheduled_tokens:
            self._under_way.append((id(output), self._shape(output), now))

    def _shape(self, output: Any) -> tuple[int, int, int]:
        """Tokens of prompts, sequences that are decoded, and tokens of KV cache that are read."""
        scheduled = output.num_scheduled_tokens
        requests = self._scheduler.requests
        more = [tokens for tokens in scheduled.values() if tokens > 1]
        context = sum([requests[id_].num_computed_tokens for id_ in scheduled])
        return sum(more), len(scheduled) - len(more), context

    def updated(self, output: Any) -> None:
        """A step's results are here: learn how long it took."""
        while self._under_way:
            number, shape, began = self._under_way.popleft()
            if number == id(output):
                now = time.monotonic()
                # It began when the one before had ended, if that was later than its call.
                seconds = now - max(began, self._ended_at)
                self._ended_at = now
                self.times.observe(*shape, seconds)
                return

    def _note_first_tokens(self, now: float) -> None:
        for work in self._new:
            if work.first is None and work.made:
                work.first = now
        self._new = [one for one in self._new if one.first is None and one.id in self._works]

    # Who cannot make it

    def _give_up(self, now: float) -> None:
        if now - self._looked >= LOOK_S:
            self._looked = now
            for request in list(self.queue):
                self._is_given_up(request, now)
        seats = max(1, self._seats() - len(self._scheduler.running))
        # Behind one that is given up stands the next, which may be no better.
        given_up = True
        while given_up:
            turns = [*self.queue.heads(), *self.queue.ahead(min(seats, AT_ONCE))]
            given_up = any(self._is_given_up(request, now) for request in turns)

    def _is_given_up(self, request: Any, now: float) -> bool:
        work = self._works[request.request_id]
        if work.made or work.demoted or request.is_finished():
            return False  # its client reads already, or it is known
        verdict = self.policy.hopeless(work, now)
        if verdict is None:
            return False
        if verdict.drop:
            self.refuse(request, Refused(504, verdict.message))
        else:
            self.queue.demote(request)
        return True

    # Who gives way

    def _make_room(self, now: float) -> None:
        """Preempt running work for that whose turn it is, if that makes enough room for it."""
        scheduler = self._scheduler
        seats = self._seats() - len(scheduler.running)
        free = self._pool.get_num_free_blocks()
        running = [self._works[one.request_id] for one in scheduler.running]
        going: list[RequestWork] = []  # at the end: until then nothing moves in the queue
        for request in self.queue.ahead(AT_ONCE):
            work = self._works[request.request_id]
            need = -(-request.num_tokens // self._block)
            victims = self._victims(work, running, seats, free - need, now)
            if victims is None:
                break
            for victim in victims:
                running.remove(victim)
                free += self._held(victim)
            going += victims
            seats += len(victims) - 1
            free -= need
        self._preempt(going, now)

    def _preempt(self, victims: Sequence[RequestWork], now: float) -> None:
        scheduler = self._scheduler
        for work in victims:
            scheduler.running.remove(work.request)
            self.policy.account((work,), now)
            scheduler._preempt_request(work.request, now)

    def _victims(
        self, work: Work, running: Sequence[RequestWork], seats: int, free: int, now: float
    ) -> list[RequestWork] | None:
        """Who has to go so that `work` gets a seat and its blocks; None: not even that is enough.

        Its prompt may be in the prefix cache, and need fewer blocks: that shows when vLLM looks.
        """
        left = list(running)
        victims: list[RequestWork] = []
        while seats <= 0 or free < 0:
            victim = self.policy.victim(work, left, now) if self.policy.preempts else None
            if victim is None and self.tenancy is not None and seats > 0:
                victim = self.tenancy.victim(work, left, free, now)
            if victim is None or not self._can_go(victim):
                return None
            assert isinstance(victim, RequestWork)
            left.remove(victim)
            victims.append(victim)
            seats += 1
            free += self._held(victim)
        return victims

    def _seats(self) -> int:
        scheduler = self._scheduler
        most: int = getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs)
        return most - int(scheduler.num_waiting_for_streaming_input)

    def _held(self, work: RequestWork) -> int:
        """Blocks that are free when a request is preempted: those that nobody else uses."""
        managers = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        blocks = [block for one in managers for block in one.req_to_blocks.get(work.id, ())]
        return sum(block.ref_cnt == 1 for block in blocks)

    def _can_go(self, work: Work) -> bool:
        can = getattr(self._scheduler, "_request_blocks_can_be_freed", None)
        assert isinstance(work, RequestWork)
        return can is None or bool(can(work.request))

    # Who rests, and how much of prompts

    @contextlib.contextmanager
    def _resting(self, works: Sequence[RequestWork], now: float) -> Iterator[None]:
        scheduler = self._scheduler
        running = scheduler.running
        rest = {work.id for work in self.policy.resting(works, now)}
        if not rest:
            yield
            return
        scheduler.running = [one for one in running if one.request_id not in rest]
        try:
            with lowered(self._per_seat(len(rest))):
                yield
        finally:
            still = {one.request_id for one in scheduler.running} | set(rest)
            before = {one.request_id for one in running}
            scheduler.running = [one for one in running if one.request_id in still] + [
                one for one in scheduler.running if one.request_id not in before
            ]

    def _per_seat(self, less: int) -> list[tuple[Any, str, int]]:
        scheduler = self._scheduler
        names = ("max_num_running_reqs", "max_num_active_reqs")
        return [(scheduler, name, less) for name in names if hasattr(scheduler, name)]

    @contextlib.contextmanager
    def _prompts_limited(
        self, budget: PrefillBudget, works: Sequence[RequestWork], now: float
    ) -> Iterator[None]:
        scheduler = self._scheduler
        decoded = [one for one in scheduler.running if not one.is_prefill_chunk]
        if len(decoded) < len(scheduler.running):
            # Decodes come first: what is left of the step is the prompts'.
            chunks = [one for one in scheduler.running if one.is_prefill_chunk]
            scheduler.running = decoded + chunks
        target = self.policy.step_s(works, now) if self.policy.paces and works else None
        context = sum([one.num_computed_tokens for one in decoded])
        most = scheduler.max_num_scheduled_tokens
        less = most - len(decoded) - budget.tokens(len(decoded), context, now, target)
        with lowered([(scheduler, "max_num_scheduled_tokens", less)] if less > 0 else []):
            yield


@contextlib.contextmanager
def lowered(limits: Sequence[tuple[Any, str, int]]) -> Iterator[None]:
    """Lower attributes, (owner, name, by how much), for a while."""
    before = [getattr(owner, name) for owner, name, _ in limits]
    try:
        for (owner, name, less), value in zip(limits, before, strict=True):
            owner.__dict__[name] = value - less
        yield
    finally:
        for (owner, name, _), value in zip(limits, before, strict=True):
            owner.__dict__[name] = value
