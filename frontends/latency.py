"""Inter-token latencies of a step, counted by group instead of one by one.

vLLM observes a Prometheus histogram once per token (1.0-1.4 µs each). But the latency of a token is
the difference of two steps' timestamps, so all requests that ran in the same two steps have the
very same one: a step is one or two groups, and a group is one addition.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from itertools import repeat
from typing import Any

from .bookkeeping import prometheus_logger

logger = logging.getLogger("vllm.scalellm")


def observe(histogram: Any, value: float, count: int) -> None:
    """Observe `value` `count` times in a histogram of prometheus_client."""
    bucket = bisect_left(histogram._upper_bounds, value)
    histogram._sum.inc(value * count)
    histogram._buckets[bucket].inc(count)


class StepLatencies:
    """Groups of one step. `add` for each output in its order, then `close`."""

    def __init__(self, engine_client: Any) -> None:
        self._histogram = _histogram_of(prometheus_logger(engine_client))
        self._last = -1.0
        self._count = 0
        self._stats: Any = None

    def add(self, now: float, last: float, stats: Any) -> None:
        """One request's token at `now`, its token before that at `last` (s, engine's clock)."""
        if last == self._last:
            self._count += 1
            return
        self.close(now)
        self._last, self._count, self._stats = last, 1, stats

    def add_groups(self, groups: list[tuple[float, int]], stats: Any) -> None:
        """Latencies that were grouped already: (seconds, requests)."""
        for latency, count in groups:
            if self._histogram is not None:
                observe(self._histogram, latency, count)
            else:
                stats.inter_token_latencies_iter.extend(repeat(latency, count))

    def close(self, now: float | None) -> None:
        """Count the group that is open."""
        if not self._count:
            return
        assert now is not None
        if self._histogram is not None:
            observe(self._histogram, now - self._last, self._count)
        else:
            self._stats.inter_token_latencies_iter.extend(repeat(now - self._last, self._count))
        self._last, self._count, self._stats = -1.0, 0, None


def _histogram_of(logger: Any) -> Any:
    """The histogram of vLLM's Prometheus logger, where it can be added to by the number."""
    if logger is None:
        return None
    found = next(iter(logger.histogram_inter_token_latency.values()), None)
    fits = all(hasattr(found, name) for name in ("_upper_bounds", "_sum", "_buckets"))
    return found if fits else None
