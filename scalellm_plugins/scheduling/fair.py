"""Fair sharing between tenants by virtual token counters.

Each tenant has a counter of the service that it got: tokens of its prompts and tokens made for it,
weighted, divided by the tenant's own weight. Whoever waits with the lowest counter is next. A
tenant that comes back after a pause is lifted to the lowest counter of those that wait, so nobody
saves service up. While two tenants both wait, their service differs by a constant that depends
neither on time nor on how much either sends: the virtual token counter of Sheng et al., "Fairness
in Serving Large Language Models", arXiv 2401.00588. Pure: no vLLM, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from .terms import DEFAULT as DEFAULT
from .terms import TENANT as TENANT
from .terms import WEIGHT as WEIGHT

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
"""What a token of a prompt and a generated one cost, as in the paper's experiments."""

MOST = 8192
"""Tenants that are remembered though nothing of theirs waits."""


class VirtualTokens:
    """The counters. Tenants are known by any name; a new one begins where it is lifted to."""

    def __init__(self) -> None:
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
        lowest = min(map(self.served, waiting)) if waiting else self._last
        self._served[tenant] = max(self.served(tenant), lowest)
        if len(self._served) > MOST + len(waiting):
            self._forget(waiting, keep=tenant)

    def empty(self, tenant: str) -> None:
        """Nothing of a tenant waits any more."""
        self._last = self.served(tenant)

    def first(self, waiting: Iterable[str]) -> str:
        """Whose turn it is; of equals the first."""
        return min(waiting, key=self.served)

    def serve(self, tenant: str, *, prompt: int = 0, output: int = 0) -> None:
        """Charge tokens; negative: give them back."""
        tokens = PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output
        self._served[tenant] = self.served(tenant) + tokens / self._weights.get(tenant, 1.0)

    def _forget(self, waiting: Collection[str], keep: str) -> None:
        """Forget half of those that do not wait, the least served first: who comes back is lifted
        over them anyway."""
        idle = [name for name in self._served if name != keep and name not in waiting]
        idle.sort(key=self.served)
        for name in idle[: len(idle) // 2]:
            del self._served[name]
            self._weights.pop(name, None)
