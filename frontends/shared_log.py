"""vLLM's statistics line ("Avg prompt throughput: …"), one for all workers.

Every worker notes on the board what its share of the engine's messages says. The one in slot 0,
which never retires, hands the sums to vLLM's own loggers when a line is due, so the line is vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from .shared_board import ENGINES, Board

_CACHES = (
    # Counts on the board; where a message has them.
    ("prefix", "prefix_cache_stats"),
    ("connector", "connector_prefix_cache_stats"),
)


class SharedStatLogger:
    """In the place of vLLM's logging logger in a `StatLoggerManager`, which it feeds.

    What a line may have besides throughput, requests and caches (speculative decoding, KV transfer)
    is not added up, as vLLM's own API servers do not: nothing is said about it.
    """

    def __init__(
        self, inner: Any, board: Board, slot: int, engines: Iterable[int], sent: Any
    ) -> None:
        self._inner = inner
        self._board = board
        self._slot = slot
        self._engines = list(engines)
        self._sent = sent
        self._logged = {engine: board.totals(engine) for engine in self._engines}

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Note what a message of the engine says."""
        if not 0 <= engine_idx < ENGINES:
            return
        board, slot = self._board, self._slot
        if iteration_stats is not None:
            amounts = (
                iteration_stats.prompt_token_stats.computed,
                iteration_stats.num_generation_tokens,
                iteration_stats.num_corrupted_reqs,
                iteration_stats.num_preempted_reqs,
            )
            board.add(slot, engine_idx, "prompt_tokens", amounts)
        if scheduler_stats is not None:
            news = (
                self._sent(),
                scheduler_stats.num_running_reqs,
                scheduler_stats.num_waiting_reqs,
                scheduler_stats.num_skipped_waiting_reqs,
                scheduler_stats.kv_cache_usage,
            )
            board.tell(slot, engine_idx, news)
            for count, name in _CACHES:
                self._add_cache(engine_idx, count, getattr(scheduler_stats, name))
        self._add_cache(engine_idx, "mm", mm_cache_stats)

    def _add_cache(self, engine: int, count: str, stats: Any) -> None:
        if stats is not None and (stats.requests or stats.reset):
            amounts = (stats.reset, stats.requests, stats.queries, stats.hits)
            self._board.add(self._slot, engine, f"{count}_resets", amounts)

    def log(self) -> None:
        """Write the line, in the worker whose task that is; vLLM calls it in every one."""
        if self._slot != 0:
            return
        for engine in self._engines:
            self._feed(engine)
        self._inner.log()

    def _feed(self, engine: int) -> None:
        from vllm.v1.metrics.stats import MultiModalCacheStats, PrefixCacheStats, SchedulerStats

        before, now = self._logged[engine], self._board.totals(engine)
        self._logged[engine] = now
        new = {name: int(now[name] - before[name]) for name in now}
        newest = self._board.newest(engine)

        def cache(kind: Any, name: str) -> Any:
            parts = {part: new[f"{name}_{part}"] for part in ("requests", "queries", "hits")}
            return kind(reset=bool(new[f"{name}_resets"]), **parts)

        scheduler = SchedulerStats(
            num_running_reqs=int(newest["running"]),
            num_waiting_reqs=int(newest["waiting"]),
            num_skipped_waiting_reqs=int(newest["skipped"]),
            kv_cache_usage=newest["kv_usage"],
            prefix_cache_stats=cache(PrefixCacheStats, "prefix"),
            connector_prefix_cache_stats=cache(PrefixCacheStats, "connector"),
        )
        iteration = SimpleNamespace(
            prompt_token_stats=SimpleNamespace(computed=new["prompt_tokens"]),
            num_generation_tokens=new["generation_tokens"],
            num_corrupted_reqs=new["corrupted"],
            num_preempted_reqs=new["preempted"],
        )
        images = cache(MultiModalCacheStats, "mm")
        self._inner.record(scheduler, iteration, mm_cache_stats=images, engine_idx=engine)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the logger's own."""
        return getattr(self._inner, name)


def share(manager: Any, board: Board, slot: int, sent: Any) -> None:
    """Put one of these in the place of each logging logger of a `StatLoggerManager`, just made.

    `sent()`: when the engine sent the message that is being recorded.
    """
    from vllm.v1.metrics.loggers import LoggingStatLogger

    for place, logger in enumerate(manager.stat_loggers):
        wrapped = list(getattr(logger, "per_engine_stat_loggers", {0: logger}).values())
        if all(type(one).__module__ == LoggingStatLogger.__module__ for one in wrapped) and all(
            isinstance(one, LoggingStatLogger) for one in wrapped
        ):
            manager.stat_loggers[place] = SharedStatLogger(
                logger, board, slot, manager.engine_indexes, sent
            )
