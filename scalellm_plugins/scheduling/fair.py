"""Fair sharing between tenants by virtual token counters.

Each tenant has a counter of the service that it got: tokens of its prompts and tokens made for it,
weighted, divided by the tenant's own weight. Whoever waits with the lowest counter is next. A
tenant that comes back after a pause is lifted to the lowest counter of those that wait, so nobody
saves service up. While two tenants both wait, their service differs by a constant that depends
neither on time nor on how much either sends: the virtual token counter of Sheng et al., "Fairness
in Serving Large Language Models", arXiv 2401.00588. Pure: no vLLM, no clock.

`Fair` is the policy over them. With `locality_tokens` it prefers what is in the prefix cache among
tenants that are no more than so much service ahead: deficit longest prefix match of Cao et al.,
"Locality-aware Fair Scheduling in LLM Serving", arXiv 2501.14312.
"""

# ruff: noqa: ARG002  (a policy is told the time, and counters have no use for it)

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .policy import Engine, Policy, Work

if TYPE_CHECKING:
    from scalellm_plugins.config import SchedulerConfig

from .terms import DEFAULT as DEFAULT
from .terms import TENANT as TENANT
from .terms import WEIGHT as WEIGHT

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
"""What a token of a prompt and a generated one cost, as in the paper's experiments."""

MOST = 8192
"""Tenants that are remembered though nothing of theirs waits."""


class VirtualTokens:
    """The counters. Tenants are known by any name; a new one begins where it is lifted to."""

    def __init__(
        self, prompt_weight: float = PROMPT_WEIGHT, output_weight: float = OUTPUT_WEIGHT
    ) -> None:
        self._costs = prompt_weight, output_weight
        self._served: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._last = 0.0
        """The counter of whoever was the last to wait."""

    def served(self, tenant: str) -> float:
        """Weighted tokens per weight so far."""
        return self._served.get(tenant, 0.0)

    def weigh(self, tenant: str, weight: float) -> None:
        """Set a tenant's weight (1 by default); it counts for service from now on."""
        if weight == 1.0:
            self._weights.pop(tenant, None)
        else:
            self._weights[tenant] = weight

    def arrive(self, tenant: str, waiting: Collection[str]) -> None:
        """A request of a tenant arrives; `waiting`: tenants that have some waiting already."""
        if tenant in waiting:
            return
        self.lift(tenant, min(map(self.served, waiting)) if waiting else self._last)
        if len(self._served) > MOST + len(waiting):
            self._forget(waiting, keep=tenant)

    def lift(self, tenant: str, least: float) -> None:
        """A tenant counts as served at least so much."""
        self._served[tenant] = max(self.served(tenant), least)

    def empty(self, tenant: str) -> None:
        """Nothing of a tenant waits any more."""
        self._last = self.served(tenant)

    def first(self, waiting: Iterable[str]) -> str:
        """Whose turn it is; of equals the first."""
        return min(waiting, key=self.served)

    def serve(self, tenant: str, *, prompt: int = 0, output: int = 0) -> None:
        """Charge tokens; negative: give them back."""
        tokens = self._costs[0] * prompt + self._costs[1] * output
        self._served[tenant] = self.served(tenant) + tokens / self._weights.get(tenant, 1.0)

    def _forget(self, waiting: Collection[str], keep: str) -> None:
        """Forget half of those that do not wait, the least served first: who comes back is lifted
        over them anyway."""
        idle = [name for name in self._served if name != keep and name not in waiting]
        idle.sort(key=self.served)
        for name in idle[: len(idle) // 2]:
            del self._served[name]
            self._weights.pop(name, None)


class Fair(Policy):
    """Tenants take turns by their counters; within a tenant first come, first served.

    While two tenants both wait, their service per weight, counted from when both began to, differs
    by at most max(wp × Linput, wq × M) / w, and between any two moments by at most twice that (the
    paper's bound): wp × Linput is what the longest prompt costs, wq × M what all tokens cost that
    running work can have, w the smaller of their weights. `locality_tokens` (Q) adds Q to it:

    - whoever waits with at most Q more than the lowest counter may be next, and of those the one
      with the longest prefix in the cache is;
    - a request with a prefix in the cache when it comes may overtake at most Q tokens of prompts
      of its own tenant, so that what nobody shares does not starve behind what many do;
    - a prompt's tokens that are in the cache are not charged, as in that paper: what counts is
      what was computed.
    """

    name = "fair"

    def __init__(self, engine: Engine, options: SchedulerConfig) -> None:
        super().__init__(engine, options)
        self.counters = VirtualTokens(options.prompt_weight, options.output_weight)
        self._quantum = options.locality_tokens
        self._lines: dict[str, int] = {}
        """Tokens of prompts that have come, by tenant; only with locality."""
        self._level = 0.0
        """Nobody who waited at the last admission had a lower counter."""

    def group(self, work: Work) -> Hashable:
        return work.tenant

    def order(self, work: Work) -> Any:
        return work.line  # fixed when it came, whatever is evicted or cached meanwhile

    def first(self, heads: Mapping[Hashable, Work], now: float) -> Hashable:
        if len(heads) == 1:
            return next(iter(heads))
        counters = {group: self.counters.served(work.tenant) for group, work in heads.items()}
        most = min(counters.values()) + self._quantum
        near = [group for group, counter in counters.items() if counter <= most]
        if not self._quantum:
            return min(near, key=lambda group: heads[group].arrival)
        return min(near, key=lambda one: (-heads[one].cached, counters[one], heads[one].arrival))

    def arrived(self, work: Work, waiting: Collection[Hashable], now: float) -> None:
        tenant = work.tenant
        if work.weight is not None:
            self.counters.weigh(tenant, work.weight)
        self.counters.arrive(tenant, waiting)  # type: ignore[arg-type]
        if self._quantum:
            if len(self._lines) > MOST + len(waiting):
                self._lines = {one: tokens for one, tokens in self._lines.items() if one in waiting}
            before = self._lines.get(tenant, 0)
            self._lines[tenant] = before + work.prompt
            work.line = before - min(work.cached, self._quantum)

    def admitted(self, work: Work, now: float) -> None:
        tenant = work.tenant
        self._level = self.counters.served(tenant) - self._quantum
        if work.charged is None:  # what was preempted has paid
            work.charged = work.prompt
            if self._quantum:
                work.charged -= min(work.cached, work.prompt)
            self.counters.serve(tenant, prompt=work.charged)
        # Within other policies' groups nobody says when a tenant's last has gone: it may be this.
        self.counters.empty(tenant)

    def withdrawn(self, work: Work, now: float) -> None:
        if work.charged is not None and not work.preemptions:
            self.counters.serve(work.tenant, prompt=-work.charged)
            work.charged = None

    def preempted(self, work: Work, now: float) -> None:
        # Who has work running and none waiting may have fallen far behind. That is not saved up.
        self.counters.lift(work.tenant, self._level)

    def emptied(self, group: Hashable) -> None:
        self.counters.empty(group)  # type: ignore[arg-type]

    def account(self, works: Iterable[Work], now: float) -> None:
        for work in works:
            if work.made != work.paid:
                self.counters.serve(work.tenant, output=work.made - work.paid)
                work.paid = work.made
