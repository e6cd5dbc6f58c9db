"""Strict classes: who is more urgent is next, and takes the place of running work if need be.

Lower is more urgent, as in vLLM (`priority`, `X-Vllm-Priority`). vLLM's own priority policy takes a
running request's place only when KV blocks run out; here also when all seats are taken.

* Nothing starves: for every `ageing_s` that it waits, work rises a class, so nothing n classes more
  urgent goes before it that came more than `n × ageing_s` later. It keeps the class that it has
  risen to while it runs. Rising gives it the next free seat, never somebody else's: only the class
  that it came with displaces others.
* Nothing thrashes: a preempted request computes its prompt and its tokens anew (from the prefix
  cache, if they are still there), so whoever was preempted n times then runs `n × min_run_s` before
  it can be preempted again. The first time costs no wait at all.
"""

# ruff: noqa: ARG002  (see policy.py)

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from .policy import Policy, Work


class Priority(Policy):
    """See the module."""

    name = "priority"
    preempts = ranks = True

    def group(self, work: Work) -> Hashable:
        return work.priority

    def first(self, heads: Mapping[Hashable, Work], now: float) -> Hashable:
        # The oldest of a class stands at its head, so nobody behind it has risen further.
        def turn(group: Hashable) -> tuple[int, float]:
            work = heads[group]
            return self._level(work, now), work.arrival

        return min(heads, key=turn)

    def admitted(self, work: Work, now: float) -> None:
        work.level = self._level(work, now)

    def victim(self, work: Work, running: Sequence[Work], now: float) -> Work | None:
        """The latest to begin in the lowest class below `work`'s own: least is lost with it."""
        # From the end, so that of equals it is the last.
        below = [one for one in running if one.level > work.priority and self._may_go(one, now)]
        below.reverse()
        return max(below, key=lambda one: (one.level, one.since or 0.0), default=None)

    def rank(self, work: Work, now: float) -> Any:
        return work.level

    def _level(self, work: Work, now: float) -> int:
        return work.priority - math.floor(max(0.0, now - work.arrival) / self.options.ageing_s)

    def _may_go(self, work: Work, now: float) -> bool:
        since = now if work.since is None else work.since
        return now - since >= work.preemptions * self.options.min_run_s
