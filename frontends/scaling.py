"""When to add a worker, when to let one go, and how long to wait after a crash.

Pure: time comes in as numbers (seconds of any monotonic clock), decisions go out as words. The
supervisor carries them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Decision = Literal["grow", "shrink"]


@dataclass(frozen=True)
class Thresholds:
    """When demand counts as too much or too little.

    A worker is added when the mean busy share stays above `grow_above` for `grow_after_s`, and let
    go when the others could carry everything below `shrink_below` each for `shrink_after_s`. The
    gap between the two is the hysteresis: right after a worker is added the others fall below
    `grow_above`, and right after one is let go the others stay below it.
    """

    grow_above: float = 0.7
    grow_after_s: float = 1.0
    shrink_below: float = 0.4
    shrink_after_s: float = 30.0


class ScalingPolicy:
    """How many workers there should be, between `minimum` and `maximum`."""

    def __init__(self, minimum: int, maximum: int, thresholds: Thresholds | None = None) -> None:
        assert 1 <= minimum <= maximum
        self.minimum = minimum
        self.maximum = maximum
        self.thresholds = thresholds or Thresholds()
        self._busy_since: float | None = None
        self._idle_since: float | None = None

    def observe(self, now: float, busy: Sequence[float], coming: int = 0) -> Decision | None:
        """Say what to do, given the busy share of each serving worker and how many are starting.

        While workers are `coming` nothing is decided: what they will change is not known yet. A
        decision starts the clocks anew, so that its effect is seen before the next one.
        """
        serving = len(busy)
        if coming or not serving:
            self._reset()
            return None
        if serving < self.minimum:
            return self._decide("grow")
        total = sum(busy)
        limits = self.thresholds
        if total / serving > limits.grow_above and serving < self.maximum:
            self._idle_since = None
            self._busy_since = now if self._busy_since is None else self._busy_since
            if now - self._busy_since >= limits.grow_after_s:
                return self._decide("grow")
        elif serving > self.minimum and total / (serving - 1) < limits.shrink_below:
            self._busy_since = None
            self._idle_since = now if self._idle_since is None else self._idle_since
            if now - self._idle_since >= limits.shrink_after_s:
                return self._decide("shrink")
        else:
            self._reset()
        return None

    def _decide(self, decision: Decision) -> Decision:
        self._reset()
        return decision

    def _reset(self) -> None:
        self._busy_since = self._idle_since = None


class CrashLoop:
    """How long a slot's next worker waits, after its workers died: 0, 0.5, 1, 2 … seconds.

    The first death after a good run costs no wait. A worker that served `settled_after_s` had a
    good run; `patience` deaths in a row without one are a crash loop.
    """

    def __init__(self, patience: int = 5, settled_after_s: float = 3.0) -> None:
        self.patience = patience
        self.settled_after_s = settled_after_s
        self.deaths = 0

    def died(self, served_s: float) -> float | None:
        """Note a death after `served_s` seconds of serving; return the wait, or None to give up."""
        self.deaths = 1 if served_s >= self.settled_after_s else self.deaths + 1
        if self.deaths >= self.patience:
            return None
        return 0.0 if self.deaths == 1 else 0.25 * 2.0 ** (self.deaths - 1)
