"""Stages of a request: what is counted, and what clients are told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("prometheus_client")

import prometheus_client

from scalellm_plugins.frontends.timing import STAGES, Clock, Stages, server_timing


def engine(queued: float, scheduled: float, first: float, last: float) -> Any:
    """vLLM's `RequestStateStats`."""
    return SimpleNamespace(
        queued_ts=queued, scheduled_ts=scheduled, first_token_ts=first, last_token_ts=last
    )


def clock(arrived: float, tokenized: float, done: float) -> Clock:
    made = Clock()
    made.arrived, made.tokenized, made.done = arrived, tokenized, done
    return made


def test_stages_add_up_to_the_whole() -> None:
    stages = clock(10.0, 10.5, 15.0).stages(engine(10.75, 11.75, 12.0, 14.5))
    assert stages == {
        "tokenize": 0.5,
        "to_engine": 0.25,
        "engine_queue": 1.0,
        "prefill": 0.25,
        "decode": 2.5,
        "write": 0.5,
    }
    assert list(stages) == list(STAGES)
    assert sum(stages.values()) == 5.0


def test_clocks_that_are_read_a_moment_apart_make_no_negative_stage() -> None:
    stages = clock(10.0, 10.5, 12.0).stages(engine(10.4, 11.0, 12.5, 12.5))
    assert stages["to_engine"] == 0.0
    assert stages["write"] == 0.0
    assert min(stages.values()) >= 0.0


def test_the_header_is_in_milliseconds() -> None:
    stages = clock(0.0, 0.5, 4.0).stages(engine(1.0, 1.5, 2.0, 3.0))
    line = server_timing(stages)
    assert line.startswith(b"server-timing: tokenize;dur=500.00, to_engine;dur=500.00, ")
    assert line.endswith(b", total;dur=4000.00\r\n")
    assert line.count(b"\r\n") == 1


def sample(name: str, **labels: str) -> float:
    return prometheus_client.REGISTRY.get_sample_value(name, labels) or 0.0


def test_the_gateways_share_is_what_is_not_the_engines() -> None:
    before = {name: sample(f"scalellm:{name}_seconds_total") for name in ("request", "gateway")} | {
        stage: sample("scalellm:request_stage_seconds_sum", stage=stage) for stage in STAGES
    }
    stages = Stages()
    stages.count(dict.fromkeys(STAGES, 1.0))
    stages.count({**dict.fromkeys(STAGES, 0.0), "decode": 2.0})
    assert sample("scalellm:request_seconds_total") - before["request"] == pytest.approx(8.0)
    assert sample("scalellm:gateway_seconds_total") - before["gateway"] == pytest.approx(3.0)
    assert sample("scalellm:gateway_share") == pytest.approx(3 / 8)
    for stage in STAGES:
        now = sample("scalellm:request_stage_seconds_sum", stage=stage)
        assert now - before[stage] == pytest.approx(3.0 if stage == "decode" else 1.0)


def test_metrics_are_made_once_per_process() -> None:
    """An application that is built a second time must not fail on the names."""
    assert Stages()._total is Stages()._total
