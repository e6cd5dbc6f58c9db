"""Tenants' limits in vLLM's scheduler: tells `quotas.py` what happens, and does what it says.

Limits come with requests, from the frontend's file of tenants. Where none has any, a request costs
one look at its extra arguments, and a step nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .kept_blocks import keep_blocks
from .policy import Work
from .quotas import Quotas
from .refused import Refused
from .requests import RequestWork, tenant_of
from .tenant_limits import TenantLimits


class Tenancy:
    """The limits of one scheduler's tenants. `works`: those of the host, by request."""

    def __init__(self, scheduler: Any, works: Mapping[str, RequestWork]) -> None:
        self._scheduler = scheduler
        self._works = works
        self._pool = scheduler.kv_cache_manager.block_pool
        self._managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._block = scheduler.block_size
        self._quotas = Quotas(self._pool.num_gpu_blocks - 1, self._block)
        self._floors: Mapping[str, int] = {}
        self._on = False
        """Whether any tenant has ever had a limit."""
        self._made: dict[str, int] = {}
        """Tokens of running work that were charged."""

    @property
    def has_floors(self) -> bool:
        """Whether blocks are guaranteed to anybody, so that others may have to give way."""
        return bool(self._floors)

    def arrived(self, work: RequestWork, now: float) -> Refused | None:
        """A request comes; why it is not let in, if it is not."""
        quotas = self._quotas
        params = work.request.sampling_params
        limits = TenantLimits.of(params.extra_args if params is not None else None)
        quotas.note(work.tenant, limits, now)
        if (floors := quotas.floor_blocks()) != self._floors:
            self._floors = floors
            self._keep(floors)
        if not self._on:
            if not quotas.limited:
                return None
            self._begin(now)
        refused = quotas.refusal(work, now)
        if refused is None:
            quotas.arrived(work, now)
        return refused

    def _keep(self, floors: Mapping[str, int]) -> None:
        """Prefixes up to floors stay in the cache."""
        manager, connector = self._scheduler.kv_cache_manager, self._scheduler.connector
        if manager.enable_caching and connector is None:  # which would walk the queue itself
            keep_blocks(manager, tenant_of).keep(floors)

    def _begin(self, now: float) -> None:
        """The first limit: tell of what was there before it."""
        self._on = True
        for one in self._scheduler.running:
            work = self._works[one.request_id]
            self._made[work.id] = work.made
            self._quotas.started(work, self._blocks(work), now, self._table(work))

    def begin(self, now: float) -> Sequence[RequestWork]:
        """A step begins: take note of what runs. Returns whom its tenant's ceiling forbids to go
        on."""
        quotas, running = self._quotas, self._scheduler.running
        if not self._on:
            return ()
        works = [self._works[one.request_id] for one in running]
        for work in works:
            self._charge(work, now)
        if not quotas.counts_blocks:
            return ()
        for work in works:
            quotas.holds(work, self._table(work))
        over = []
        while (tenant := quotas.over_ceiling()) is not None:
            latest = next(one for one in reversed(works) if one.tenant == tenant)
            works.remove(latest)
            quotas.stopped(latest, now)  # so that it is not over any more
            over.append(latest)
        return over

    def _charge(self, work: RequestWork, now: float) -> None:
        made = work.made
        before = self._made.get(work.id, 0)
        if made != before:
            self._made[work.id] = made
            self._quotas.made(work.tenant, made - before, now)

    def _table(self, work: RequestWork) -> int:
        return sum([len(one.req_to_blocks.get(work.id, ())) for one in self._managers])

    def _blocks(self, work: RequestWork) -> int:
        """Of its table, once all of it that is known is computed."""
        blocks: int = -(-work.request.num_tokens // self._block)
        return blocks

    def allows(self, work: Work, now: float) -> bool:
        """Whether waiting work may begin to run."""
        if not self._on:
            return True
        assert isinstance(work, RequestWork)
        free = self._pool.get_num_free_blocks()
        return self._quotas.allows(work, self._blocks(work), free, now)

    def victim(
        self, work: Work, running: Sequence[RequestWork], free: int, now: float
    ) -> RequestWork | None:
        """Who has to give up blocks that are guaranteed to `work`'s tenant; `free`: how many are
        left when `work` has got its own, so less than none."""
        if not self._quotas.counts_blocks:
            return None
        assert isinstance(work, RequestWork)
        need = self._blocks(work)
        tenant = self._quotas.gives_way(work, need, free + need, now)
        theirs = [one for one in running if one.tenant == tenant]
        return theirs[-1] if theirs else None

    def started(self, work: Work, now: float) -> None:
        """Work begins to run."""
        if self._on:
            assert isinstance(work, RequestWork)
            self._quotas.started(work, self._blocks(work), now, self._table(work))

    def stopped(self, work: Work, now: float) -> None:
        """Work has lost its place, or has not found one."""
        if self._on:
            self._quotas.stopped(work, now)

    def ended(self, work: RequestWork, now: float) -> None:
        """Work is over."""
        if self._on:
            self._charge(work, now)
            self._quotas.ended(work, now)
        self._made.pop(work.id, None)
