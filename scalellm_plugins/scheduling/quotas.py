"""Limits of tenants inside the engine: sequences, shares of the KV cache, tokens per minute.

Pure: no vLLM, no clock. Whoever hosts a policy tells what happens to requests, and asks before it
admits one. What is decided here, and why:

- **Blocks** are counted by the tables of requests: a block that a prefix shares between three
  requests counts three times, for whoever runs each. So a tenant's use is the sum over its own
  requests, whatever the others do, and nobody becomes the owner of a block by chance. Blocks that
  are cached and that nobody uses count as free (`kept_blocks.py` protects them).
- **A ceiling** holds when work is admitted and as it grows (`over_ceiling`), except for a tenant's
  only sequence: to stop that would throw away what it made and never let it end.
- **A floor** is held free while its tenant is active: it has work, or had some less than `hold_s`
  ago. Others' work is admitted only beside what is left of it. Growth of what runs may use it, and
  gives it back when the tenant wants it: `gives_way` says who has most beyond its own floor.
  Floors that add up to more than all are scaled down. An engine in which nothing runs
  serves whoever is next, whatever the floors: nobody else would be served sooner.
  Work that needs more than all floors of others leave may wait for that; ceilings of at most one
  less the others' floors refuse it instead.
- **Tokens per minute** are a bucket that holds a minute's worth and is filled continuously. The
  prompt is charged on arrival, so that a burst cannot be let in on credit, and given back if it
  never runs; generated tokens are charged as they are made. What has begun is never stopped: a
  bucket may be in debt, and nothing is let in until it is paid. A prompt longer than a minute's
  worth is let in when the bucket is full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .policy import Work
from .refused import Refused
from .tenant_limits import NONE, TenantLimits

HOLD_S = 60.0
"""How long a floor is kept free for a tenant that has nothing to do."""

_IDLE = 64
"""Tenants that are remembered though they have no work, before the first look at who can go."""


class _Held:
    """What one request has."""

    __slots__ = ("charged", "held", "promised", "runs", "tenant")

    def __init__(self, tenant: _Tenant, charged: int) -> None:
        self.tenant = tenant
        self.charged = charged
        """Tokens of its prompt, while they can be given back."""
        self.runs = False
        self.held = 0
        """Blocks in its table."""
        self.promised = 0
        """Blocks that it will have once its prompt is computed."""

    @property
    def blocks(self) -> int:
        return max(self.held, self.promised)

    @property
    def pending(self) -> int:
        return max(self.promised - self.held, 0)


class _Tenant:
    """What one tenant has, and may."""

    __slots__ = ("at", "level", "limits", "name", "running", "seen", "used", "works")

    def __init__(self, name: str) -> None:
        self.name = name
        self.limits = NONE
        self.works = 0
        """Requests that have not ended."""
        self.running = 0
        self.used = 0
        """Blocks."""
        self.seen = -math.inf
        """When it last had work."""
        self.level = 0.0
        """Tokens in its bucket at the time `at`."""
        self.at = 0.0

    def refill(self, now: float) -> float:
        """Fill the bucket up to now; return what is in it. Infinite without a limit."""
        most = self.limits.tokens_per_minute
        if most is None:
            return math.inf
        self.level = min(most, self.level + max(now - self.at, 0.0) * most / 60)
        self.at = max(now, self.at)
        return self.level

    def take(self, tokens: int, now: float) -> None:
        if self.limits.tokens_per_minute is not None:
            self.refill(now)
            self.level = min(self.level - tokens, self.limits.tokens_per_minute)


class Quotas:
    """The limits of all tenants of one engine, and what they have of it.

    For one request the host calls: `note`, `refusal`; if that is None `arrived`, then (`allows`,
    `started`, `holds`*, `stopped`)*, `ended`. What happens is always told, so that limits which
    come later find everything counted: `arrived`, `started`, `stopped`, `ended`, a microsecond
    each. The rest is needed only while `limited` is true, and `holds`, `gives_way` and
    `over_ceiling` only while `counts_blocks` is. Work that it was not told of, it ignores.

    Args:
        blocks: KV blocks that requests can have.
        block_tokens: tokens in one.
        hold_s: how long a floor is held for a tenant without work.
    """

    def __init__(self, blocks: int, block_tokens: int, *, hold_s: float = HOLD_S) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.hold_s = hold_s
        self.limited = False
        """Whether any tenant has a limit."""
        self.counts_blocks = False
        """Whether any has a floor or a ceiling."""
        self._tenants: dict[str, _Tenant] = {}
        self._floors: dict[str, _Tenant] = {}
        """Those that have one."""
        self._works: dict[str, _Held] = {}
        self._running = 0
        self._pending = 0
        """Blocks that were promised and are not in a table yet."""
        self._sweep = _IDLE

    def note(self, tenant: str, limits: TenantLimits, now: float) -> bool:
        """These are a tenant's limits from now on; return whether they are others than before."""
        known = self._tenants.get(tenant)
        if limits is NONE and known is None:
            return False
        known = known or self._tenant(tenant, now)
        if limits == known.limits:
            return False
        # A bucket keeps what was taken out of it.
        before = known.limits.tokens_per_minute
        taken = 0.0 if before is None else before - known.refill(now)
        known.limits = limits
        known.at = now
        known.level = (limits.tokens_per_minute or 0) - taken
        if limits.floor:
            self._floors[tenant] = known
        else:
            self._floors.pop(tenant, None)
        self._look_who_is_limited()
        return True

    def floor_blocks(self) -> dict[str, int]:
        """Floors in blocks by tenant, for those that have one; scaled if they exceed all."""
        return self._scaled(self._floors)

    # Arrival

    def refusal(self, work: Work, now: float) -> Refused | None:
        """Why work is not let in when it arrives; None: it is. Changes nothing."""
        tenant = self._tenants.get(work.tenant)
        if tenant is None:
            return None
        ceiling, need = self._ceiling(tenant), self._blocks_of(work.prompt + 1)
        if tenant.limits.ceiling is not None and need > ceiling:
            return Refused(
                400,
                f"a prompt of {work.prompt} tokens needs {need} KV blocks, and tenant "
                f"{tenant.name!r} may have {ceiling} ({tenant.limits.ceiling:.3g} of them all): "
                f"send at most {ceiling * self.block_tokens - 1} tokens",
            )
        most = tenant.limits.tokens_per_minute
        if most is None:
            return None
        missing = min(work.prompt, most) - tenant.refill(now)
        if missing <= 1e-6:  # rounding must not refuse who comes exactly when he was told to
            return None
        wait = missing * 60 / most
        return Refused(
            429,
            f"tenant {tenant.name!r} has used up its {most} tokens per minute: there is room for "
            f"this prompt of {work.prompt} in {math.ceil(wait)} s",
            math.ceil(wait),
        )

    def arrived(self, work: Work, now: float) -> None:
        """Work was let in, and waits: its prompt is charged."""
        tenant = self._tenant(work.tenant, now)
        if work.id in self._works:
            return
        tenant.works += 1
        tenant.seen = now
        tenant.take(work.prompt, now)
        self._works[work.id] = _Held(tenant, work.prompt)

    # Admission

    def allows(self, work: Work, blocks: int, free: int, now: float) -> bool:
        """Whether waiting work may run now.

        Args:
            work: what would run.
            blocks: of its table once its prompt (and what it made before) is computed.
            free: blocks of the pool that no request uses.
            now: s.
        """
        tenant = self._tenants.get(work.tenant)
        used = running = 0
        if tenant is not None:
            used, running = tenant.used, tenant.running
            if tenant.limits.max_running is not None and running >= tenant.limits.max_running:
                return False
            if running and used + blocks > self._ceiling(tenant):
                return False
        if not self._floors or not self._running or self.guaranteed(work, blocks, now):
            return True
        reserved = self._reserved(work.tenant, now)
        return not reserved or free - self._pending - blocks >= reserved

    def guaranteed(self, work: Work, blocks: int, now: float) -> bool:
        """Whether so many blocks more are within the floor of its tenant: if they are not free,
        somebody has to give way."""
        tenant = self._floors.get(work.tenant)
        if tenant is None:
            return False
        return tenant.used + blocks <= self._active(now).get(work.tenant, 0)

    def gives_way(self, work: Work, blocks: int, free: int, now: float) -> str | None:
        """Whose running work has to be preempted so that guaranteed work can run.

        The tenant with the most blocks beyond its own floor; ask again until there is room. None:
        there is, or the work has no right to any.
        """
        if free - self._pending >= blocks or not self.guaranteed(work, blocks, now):
            return None
        floors = self._active(now)
        beyond = {
            name: tenant.used - floors.get(name, 0)
            for name, tenant in self._tenants.items()
            if tenant.running
        }
        name = max(beyond, key=beyond.__getitem__, default=None)
        return name if name is not None and beyond[name] > 0 else None

    def over_ceiling(self) -> str | None:
        """A tenant that has grown beyond its ceiling with more than one sequence: one of them has
        to be preempted. Ask again until None."""
        for name, tenant in self._tenants.items():
            if tenant.running > 1 and tenant.used > self._ceiling(tenant):
                return name
        return None

    # What happens

    def started(self, work: Work, blocks: int, now: float, held: int | None = None) -> None:
        """Work runs: with `held` blocks in its table so far (all of them if None), `blocks` as
        in `allows`."""
        self.arrived(work, now)
        one = self._works[work.id]
        if not one.runs:
            one.runs = True
            one.tenant.running += 1
            self._running += 1
        self._set(one, blocks if held is None else held, blocks)

    def holds(self, work: Work, blocks: int) -> None:
        """Running work has so many blocks in its table now. Not how many more: so nothing drifts,
        whatever was not told in between."""
        one = self._works.get(work.id)
        if one is not None and one.runs:
            self._set(one, blocks, one.promised)

    def stopped(self, work: Work, now: float) -> None:
        """Work was preempted or withdrawn: it has no blocks, and waits again."""
        one = self._works.get(work.id)
        if one is not None and one.runs:
            self._set(one, 0, 0)
            one.runs = False
            one.tenant.running -= 1
            one.tenant.seen = now
            self._running -= 1

    def made(self, tenant: str, tokens: int, now: float) -> None:
        """A tenant's work made tokens: they are charged."""
        known = self._tenants.get(tenant)
        if known is not None:
            known.take(tokens, now)

    def ended(self, work: Work, now: float) -> None:
        """Work is over. What never made a token and computed nothing costs nothing."""
        self.stopped(work, now)
        one = self._works.pop(work.id, None)
        if one is None:
            return
        if not (work.computed or work.made or work.preemptions):
            one.tenant.take(-one.charged, now)
        one.tenant.works -= 1
        one.tenant.seen = now

    # Figures

    def used(self, tenant: str) -> int:
        """Blocks of a tenant."""
        known = self._tenants.get(tenant)
        return known.used if known else 0

    def running(self, tenant: str) -> int:
        """Sequences of a tenant."""
        known = self._tenants.get(tenant)
        return known.running if known else 0

    def tokens(self, tenant: str, now: float) -> float:
        """What is in a tenant's bucket; infinite if it has none, negative in debt."""
        known = self._tenants.get(tenant)
        return known.refill(now) if known else math.inf

    # Inside

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def _ceiling(self, tenant: _Tenant) -> int:
        share = tenant.limits.ceiling
        return self.blocks if share is None else max(1, int(share * self.blocks))

    def _active(self, now: float) -> dict[str, int]:
        """Floors in blocks of the tenants that they are held for."""
        return self._scaled(
            {
                name: tenant
                for name, tenant in self._floors.items()
                if tenant.works or now - tenant.seen <= self.hold_s
            }
        )

    def _scaled(self, tenants: Mapping[str, _Tenant]) -> dict[str, int]:
        scale = self.blocks / max(sum(one.limits.floor for one in tenants.values()), 1.0)
        return {name: int(one.limits.floor * scale) for name, one in tenants.items()}

    def _reserved(self, beside: str, now: float) -> int:
        """Blocks that floors of others have still to get."""
        return sum(
            max(0, blocks - self._floors[name].used)
            for name, blocks in self._active(now).items()
            if name != beside
        )

    def _set(self, one: _Held, held: int, promised: int) -> None:
        one.tenant.used -= one.blocks
        self._pending -= one.pending
        one.held, one.promised = held, promised
        one.tenant.used += one.blocks
        self._pending += one.pending

    def _tenant(self, name: str, now: float) -> _Tenant:
        known = self._tenants.get(name)
        if known is None:
            if len(self._tenants) >= self._sweep:
                self._forget(now)
            known = self._tenants[name] = _Tenant(name)
        return known

    def _forget(self, now: float) -> None:
        """Forget tenants about whom there is nothing to know: no work, no floor (for which prefixes
        are kept, too), a full bucket. Their limits come with their next request. Names may be the
        clients' own, and there is no end of them; of floors there is one."""
        for name, tenant in list(self._tenants.items()):
            most = tenant.limits.tokens_per_minute
            idle = not tenant.works and not tenant.limits.floor
            if idle and (most is None or tenant.refill(now) >= most):
                del self._tenants[name]
        self._sweep = _IDLE + 2 * len(self._tenants)
        self._look_who_is_limited()

    def _look_who_is_limited(self) -> None:
        limits = [one.limits for one in self._tenants.values()]
        self.limited = any(one != NONE for one in limits)
        self.counts_blocks = any(one.floor or one.ceiling is not None for one in limits)
