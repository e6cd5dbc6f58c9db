"""vLLM's metrics in batches: when its loggers see what was counted."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats

from scalellm_plugins.frontends import bookkeeping

from .lane_parts import Bench, bench, output

pytestmark = pytest.mark.vllm


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A lane without requests, whose batches end by themselves when the test is over."""
    made = bench()
    made.fresh()
    monkeypatch.setattr(bookkeeping, "EVERY_S", 1000.0)
    return made


def busy(lane: Bench, running: int) -> Any:
    """Deliver a step of which the scheduler says this much, and return what the gauge says."""
    stats = SchedulerStats(num_running_reqs=running, prefix_cache_stats=PrefixCacheStats())
    lane.step([output("unknown", [1])], scheduler_stats=stats)
    (logger,) = [one for one in lane.client.logger_manager.stat_loggers if "Prom" in str(type(one))]
    return logger.gauge_scheduler_running[0]._value.get()


def test_gauges_wait_while_the_engine_is_busy_and_not_when_it_is_done(lane: Bench) -> None:
    """An answer may carry them (`endpoint-load-metrics-format`), and must not say it is busy."""
    before = busy(lane, 0)
    assert before == 0
    assert busy(lane, 5) == busy(lane, 6) == before, "the loggers are called for every message"
    lane.link.book.flush()
    assert busy(lane, 7) == 6
    assert busy(lane, 0) == 0


def test_there_is_one_timer_however_often_a_batch_ends_early(lane: Bench) -> None:
    """A timer of a batch before would cut this one short."""
    for running in (1, 0, 2, 3, 0, 4, 5):
        busy(lane, running)
    book = lane.link.book
    timers = [one for one in lane.loop._scheduled if not one.cancelled()]  # type: ignore[attr-defined]
    assert [one for one in timers if one._callback == book.flush] == [book._timer]
