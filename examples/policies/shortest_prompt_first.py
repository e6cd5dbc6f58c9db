"""Short prompts first, long ones no later than `PATIENCE_S` after they came."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from scalellm_plugins.scheduling.policy import Policy, Work

PATIENCE_S = 5.0
"""Whoever has waited so long is next, whatever its length: else it might wait for ever."""


class ShortestPromptFirst(Policy):
    """Groups of lengths up to 1, 3, 7, 15, … tokens: a step looks at one request of each."""

    name = "shortest_prompt"

    def group(self, work: Work) -> Hashable:
        # A group must not change while work waits: so not "long" and "late", but by length.
        return work.prompt.bit_length()

    def order(self, work: Work) -> float:
        return work.arrival

    def first(self, heads: Mapping[Hashable, Work], now: float) -> Hashable:
        oldest = min(heads, key=lambda group: heads[group].arrival)
        if now - heads[oldest].arrival > PATIENCE_S:
            return oldest
        return min(heads)  # type: ignore[type-var]
