"""The board's sums, and the statistics line that vLLM's own logger makes of them."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.frontends.shared_board import FLOW, NEWS, Board

SLOT, ENGINE = st.integers(0, 2), st.integers(0, 1)


@given(st.lists(st.tuples(SLOT, ENGINE, st.sampled_from(FLOW), st.integers(0, 9))))
def test_totals_are_over_slots_and_by_engine(steps: list[Any]) -> None:
    board = Board(3)
    expected = {engine: dict.fromkeys(FLOW, 0.0) for engine in range(2)}
    for slot, engine, name, amount in steps:
        board.add(slot, engine, name, [amount])
        expected[engine][name] += amount
    assert {engine: board.totals(engine) for engine in range(2)} == expected


def test_the_newest_news_are_the_engines_whoever_has_them() -> None:
    board = Board(3)
    board.tell(2, 0, (20.0, 1, 2, 3, 0.5))
    board.tell(0, 0, (10.0, 9, 9, 9, 0.9))
    board.tell(1, 1, (30.0, 7, 7, 7, 0.7))
    assert tuple(board.newest(0)) == NEWS
    assert tuple(board.newest(0).values()) == (20.0, 1, 2, 3, 0.5)


def test_a_dead_workers_load_is_gone_and_its_counts_stay() -> None:
    board = Board(2)
    board.set_load(0, 3)
    board.set_load(1, 4)
    board.add(1, 0, "generation_tokens", [5])
    board.clear(1)
    assert board.load() == 3
    assert board.totals(0)["generation_tokens"] == 5


@pytest.mark.vllm
def test_one_line_says_what_all_workers_did(caplog: pytest.LogCaptureFixture) -> None:
    from vllm.config import DeviceConfig
    from vllm.v1.metrics.loggers import LoggingStatLogger, PerEngineStatLoggerAdapter
    from vllm.v1.metrics.stats import IterationStats, PrefixCacheStats, SchedulerStats

    from scalellm_plugins.frontends import shared_log

    config: Any = SimpleNamespace(
        device_config=DeviceConfig("cpu"),
        model_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        observability_config=SimpleNamespace(cudagraph_metrics=False, enable_mfu_metrics=False),
    )
    board = Board(2)
    sent = [0.0]
    managers = []
    for slot in range(2):
        logger = PerEngineStatLoggerAdapter(config, [0], LoggingStatLogger)
        other = SimpleNamespace()  # not a logging logger: it stays
        manager = SimpleNamespace(stat_loggers=[logger, other], engine_indexes=[0])
        shared_log.share(manager, board, slot, lambda: sent[0])
        assert manager.stat_loggers[1] is other
        managers.append(manager.stat_loggers[0])
        logger.per_engine_stat_loggers[0].last_log_time -= 10.0
    for slot, when, running, hits in ((1, 2.0, 4, 30), (0, 1.0, 9, 0)):
        iteration = IterationStats()
        iteration.num_generation_tokens = 500
        sent[0] = when
        cache = PrefixCacheStats(requests=1, queries=40, hits=hits)
        managers[slot].record(
            SchedulerStats(num_running_reqs=running, prefix_cache_stats=cache), iteration
        )
    with caplog.at_level(logging.INFO, "vllm"):
        logging.getLogger("vllm").addHandler(caplog.handler)
        try:
            for manager in managers:
                manager.log()
        finally:
            logging.getLogger("vllm").removeHandler(caplog.handler)
    # A record that is heard by two handlers is one line.
    lines = {id(record): record.getMessage() for record in caplog.records}
    (line,) = [text for text in lines.values() if "Avg prompt" in text]
    assert "generation throughput: 100.0 tokens/s" in line or "throughput: 99." in line
    assert "Running: 4 reqs" in line  # the newest, though slot 0 recorded last
    assert "Prefix cache hit rate: 37.5%" in line
