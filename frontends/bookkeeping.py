"""vLLM's metrics in batches: what is counted is the same, but ten times a second.

vLLM's loggers are called for every message of the engine, with some 25 operations on counters each,
and eleven more for every finished request. The code is not slow, it is cold: between two messages
other processes have had the caches, and the same lines cost 3-6 times what they cost in a loop
(`benchmarks/lane_cost.py --cold`). So statistics add up in one `IterationStats` and the loggers see
it every `EVERY_S`, and when the engine has nothing more to do: an answer may tell how busy it is
(`endpoint-load-metrics-format`). What is counted per step is still one number per step: the
histogram of tokens per iteration, and what depends on the moment (`iteration_timestamp`).

Where a logger is not vLLM's own, or there are several engines, every message is recorded as ever.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from scalellm_plugins.engine.holding import only_gauges

EVERY_S = 0.1
_OURS = "scalellm_plugins.frontends."
_THEIRS = "vllm.v1.metrics.loggers"
_ADDED = (
    *("requests", "queries", "hits"),
    *("preempted_requests", "preempted_queries", "preempted_hits"),
)


class _Muted:
    """Stands where the loggers find a histogram whose observations were made already."""

    def __init__(self, histogram: Any) -> None:
        self.histogram = histogram

    def observe(self, value: float) -> None:
        """Do nothing: see the module."""


def prometheus_logger(engine_client: Any) -> Any:
    """vLLM's Prometheus logger, if nobody else's logger listens and there is one engine."""
    manager = getattr(engine_client, "logger_manager", None)
    if manager is None or len(engine_client.engine_core.engine_ranks_managed) != 1:
        return None
    found = None
    for one in manager.stat_loggers:
        for logger in getattr(one, "per_engine_stat_loggers", {0: one}).values():
            module = type(logger).__module__
            if module != _THEIRS and not module.startswith(_OURS):
                return None
        if type(one).__name__ == "PrometheusStatLogger":
            found = one
    return found


class Bookkeeper:
    """One per worker, for the messages that `link.py` reads."""

    def __init__(self, engine_client: Any) -> None:
        from vllm.v1.metrics.stats import IterationStats

        self._client = engine_client
        self._new = IterationStats
        self._steps: Any = None
        logger = prometheus_logger(engine_client)
        if logger is not None and isinstance(logger.histogram_iteration_tokens, dict):
            histograms = logger.histogram_iteration_tokens
            self._steps = next(iter(histograms.values()))
            logger.histogram_iteration_tokens = {
                index: _Muted(histogram) for index, histogram in histograms.items()
            }
        self._waiting: list[int] = []
        """Tokens of steps that are not in the histogram yet."""
        self._iteration: Any = None
        self._scheduler: Any = None
        self._seen = 0
        self._engine = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def batching(self) -> bool:
        """Whether loggers are called in batches."""
        return self._steps is not None

    def statistics(self) -> Any:
        """Return the `IterationStats` for a message that arrives now."""
        if self._steps is None:
            return self._new()
        if self._iteration is None:
            self._iteration = self._new()
            self._seen = 0
        else:
            self._iteration.iteration_timestamp = time.time()
        return self._iteration

    def silent_step(self, tokens: int) -> None:
        """Count a step of which no message came."""
        self._iteration.num_generation_tokens += tokens
        self._seen += tokens
        self._waiting.append(tokens)

    def message(self, engine: int, scheduler: Any, iteration: Any) -> None:
        """A message is done with: count its step, and have the rest recorded in a while."""
        if self._steps is None:
            self._record(engine, scheduler, iteration)
            return
        if iteration is not None:
            counted = iteration.prompt_token_stats.computed + iteration.num_generation_tokens
            self._waiting.append(counted - self._seen)
            self._seen = counted
        if self._scheduler is None:
            self._scheduler = scheduler
        elif scheduler is not None and not _add(self._scheduler, scheduler):
            self._record(engine, self._scheduler, None)
            self._scheduler = scheduler
        elif scheduler is not None:
            self._scheduler = scheduler
        self._engine = engine
        if scheduler is not None and not scheduler.num_running_reqs:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(EVERY_S, self.flush)

    def flush(self) -> None:
        """Have everything recorded that waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        steps, self._waiting = self._waiting, []
        for tokens in steps:
            self._steps.observe(tokens)
        scheduler, self._scheduler = self._scheduler, None
        iteration, self._iteration = self._iteration, None
        if scheduler is not None or iteration is not None:
            self._record(self._engine, scheduler, iteration)

    def _record(self, engine: int, scheduler: Any, iteration: Any) -> None:
        manager = self._client._logger_ref[0]
        if manager is not None:
            manager.record(engine_idx=engine, scheduler_stats=scheduler, iteration_stats=iteration)


def _add(old: Any, new: Any) -> bool:
    """Add what `old` counted to `new`, if it is no more than queries of the prefix cache."""
    before, now = old.prefix_cache_stats, new.prefix_cache_stats
    if before is None or now is None or before.reset or now.reset:
        return before is None and only_gauges(old)
    old.prefix_cache_stats = None
    plain = only_gauges(old) and not getattr(before, "hits_by_source", None)
    old.prefix_cache_stats = before
    if plain:
        for name in _ADDED:
            setattr(now, name, getattr(now, name) + getattr(before, name))
    return plain
