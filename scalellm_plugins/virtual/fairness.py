"""How far apart the service of tenants is while both of them wait. Pure.

Service is counted as in virtual token counters (`scheduling/fair.py`; Sheng et al., arXiv
2401.00588): prompts when they are first scheduled, generated tokens as they come, weighted, and
divided by the tenant's weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from scalellm_plugins.scheduling.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT

from .job import Gap, Request


class GapMeter:
    """Follows service from step to step. `weights`: of the tenants."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self.served = dict.fromkeys(weights, 0.0)
        """Weighted tokens per weight, by tenant."""
        self.worst: Gap | None = None
        # Of pairs that both wait: the least and the most of their difference since both did.
        self._ranges: dict[tuple[str, str], tuple[float, float]] = {}

    def serve(self, tenant: str, *, prompt: int = 0, output: int = 0) -> None:
        """Count tokens of a tenant."""
        tokens = PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output
        self.served[tenant] += tokens / self._weights[tenant]

    def note(self, at: float, waiting: Iterable[str]) -> None:
        """See who waits now; to be called whenever that or service may have changed."""
        names = sorted(waiting)
        if len(names) < 2:
            self._ranges.clear()
            return
        before, self._ranges = self._ranges, {}
        served = self.served
        worst = self.worst.tokens if self.worst else -1.0
        for pair in combinations(names, 2):
            difference = served[pair[0]] - served[pair[1]]
            low, high = before.get(pair, (difference, difference))
            low, high = min(low, difference), max(high, difference)
            self._ranges[pair] = low, high
            if high - low > worst:
                worst = high - low
                self.worst = Gap(tokens=worst, pair=pair, until=at)


def bound(requests: Sequence[Request], seats: int, kv_tokens: int) -> float:
    """What virtual token counters keep the gap below, weighted tokens per weight.

    Twice the larger of the longest prompt's service and the service still to come of a full batch
    (theorem 4.4 of the paper), for the smallest weight. A batch is full by `seats`, each with the
    longest output, or by `kv_tokens`.
    """
    longest = max(request.output for request in requests)
    batch = OUTPUT_WEIGHT * min(kv_tokens, seats * longest)
    prompt = PROMPT_WEIGHT * max(request.prompt for request in requests)
    return 2 * max(prompt, batch) / min(request.weight for request in requests)
