"""Latencies counted in groups are those that vLLM counts one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.frontends import bookkeeping, latency
from scalellm_plugins.frontends.latency import StepLatencies, observe

BOUNDS = (0.01, 0.1, 1.0)
VALUES = st.one_of(st.sampled_from([0.0, *BOUNDS, 5.0, 1e9]), st.floats(0, 2))


def histogram() -> Any:
    registry = prometheus_client.CollectorRegistry()
    return prometheus_client.Histogram("h", "h", buckets=BOUNDS, registry=registry)


def samples(of: Any) -> list[tuple[str, Any, float]]:
    (metric,) = of.collect()
    return [
        (one.name, one.labels, pytest.approx(one.value))
        for one in metric.samples
        if not one.name.endswith("_created")
    ]


@given(st.lists(st.tuples(VALUES, st.integers(1, 9)), max_size=8))
def test_a_group_is_that_many_observations(groups: list[tuple[float, int]]) -> None:
    ours, theirs = histogram(), histogram()
    for value, count in groups:
        observe(ours, value, count)
        for _ in range(count):
            theirs.observe(value)
    assert samples(ours) == samples(theirs)


def client(found: Any) -> Any:
    """An engine client whose metrics go to this histogram, or nowhere."""
    return SimpleNamespace(
        logger_manager=None, engine_core=SimpleNamespace(engine_ranks_managed=[0]), found=found
    )


@given(
    steps=st.lists(st.lists(st.sampled_from([0.5, 1.0, 1.5]), max_size=6), max_size=5),
    direct=st.booleans(),
)
def test_every_latency_of_a_step_is_counted(steps: list[list[float]], direct: bool) -> None:
    """In whichever order requests come; nothing of one step leaks into the next."""
    into = histogram()
    latencies = StepLatencies(client(None))
    latencies._histogram = into if direct else None
    expected = histogram()
    now = 2.0
    for lasts in steps:
        stats = SimpleNamespace(inter_token_latencies_iter=[])
        now += 0.25
        for last in lasts:
            latencies.add(now, last, stats)
            expected.observe(now - last)
        latencies.close(now)
        for value in stats.inter_token_latencies_iter:
            into.observe(value)
        assert not (direct and stats.inter_token_latencies_iter)
        assert samples(into) == samples(expected)


def test_groups_from_the_engine_are_counted() -> None:
    into = histogram()
    latencies = StepLatencies(client(None))
    stats = SimpleNamespace(inter_token_latencies_iter=[])
    latencies.add_groups([(0.5, 2), (0.05, 1)], stats)
    assert stats.inter_token_latencies_iter == [0.5, 0.5, 0.05]
    latencies._histogram = into
    latencies.add_groups([(0.5, 2)], stats)
    assert into._sum.get() == 1.0


class PrometheusStatLogger:
    """Named as vLLM's."""

    def __init__(self, found: Any) -> None:
        self.histogram_inter_token_latency = {0: found}


class OwnLogger:
    """Somebody's own: it looks at the latencies of each step."""


PrometheusStatLogger.__module__ = "vllm.v1.metrics.loggers"


def test_other_peoples_loggers_get_latencies_one_by_one() -> None:
    found = histogram()

    def of(*loggers: Any, ranks: int = 1) -> Any:
        client = SimpleNamespace(
            logger_manager=SimpleNamespace(stat_loggers=loggers),
            engine_core=SimpleNamespace(engine_ranks_managed=range(ranks)),
        )
        return latency._histogram_of(bookkeeping.prometheus_logger(client))

    ours = PrometheusStatLogger(found)
    assert of(ours) is found
    assert of(ours, OwnLogger()) is None
    wrapped = SimpleNamespace(per_engine_stat_loggers={0: OwnLogger()})
    assert of(ours, wrapped) is None
    assert of(ours, ranks=2) is None
    assert of() is None
    assert of(PrometheusStatLogger(object())) is None
    assert bookkeeping.prometheus_logger(SimpleNamespace(logger_manager=None)) is None


@pytest.mark.vllm
def test_vllms_own_histogram_is_found() -> None:
    """Else every token costs an observation, and nobody notices."""
    pytest.importorskip("vllm")
    from .lane_parts import bench

    found = StepLatencies(bench().client)._histogram
    assert found is not None
    assert type(found).__name__ == "Histogram"
