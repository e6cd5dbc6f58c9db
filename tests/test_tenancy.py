"""Limits of tenants in vLLM's scheduler; what they are, `test_quotas.py` has."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from scalellm_plugins.scheduling.refused import Refused  # noqa: E402

from .host_parts import Clock, Run, expected, stop_clocks  # noqa: E402


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return stop_clocks(monkeypatch)


def seats(run: Run) -> Counter[str]:
    """Running requests by tenant, which is how their names begin."""
    return Counter(name.partition("-")[0] for name in run.running())


both = pytest.mark.parametrize("asynchronous", [True, False])


@both
def test_a_tenant_has_no_more_seats_than_it_may(
    asynchronous: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others pass those of its requests that wait, in one step or in many."""
    run = Run(
        monkeypatch,
        asynchronous=asynchronous,
        options={"policy": "fcfs"},
        tenants=True,
        sequences=8,
    )
    for number in range(6):
        run.add(f"a-{number}", most=12, scalellm_tenant="a", scalellm_max_running=2)
    for number in range(4):
        run.add(f"b-{number}", most=12, scalellm_tenant="b")
    run.step()
    assert seats(run) == {"a": 2, "b": 4}
    most: Counter[str] = Counter()
    while run.scheduler.has_requests():
        run.step()
        most |= seats(run)
    assert most["a"] == 2
    run.finish()
    for name in (f"a-{number}" for number in range(6)):
        assert run.got[name] == expected(name, 8, 12)


def test_a_floor_is_there_when_its_tenant_comes(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have grown into it meanwhile: they give it back."""
    run = Run(
        monkeypatch,
        options={"policy": "fcfs"},
        tenants=True,
        sequences=8,
        blocks=41,
        block_size=4,
        longest=80,
    )
    for number in range(4):
        run.add(f"b-{number}", 8, 70, scalellm_tenant="b")
    for _ in range(34):  # 40 of 40 blocks, or all but a few
        run.step()
    assert run.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() < 10
    run.add("a-0", 40, 4, scalellm_tenant="a", scalellm_kv_floor=0.5)
    run.step()
    assert seats(run)["a"] == 1
    run.finish()
    assert run.got["a-0"] == expected("a-0", 40, 4)
    for number in range(4):
        assert run.got[f"b-{number}"] == expected(f"b-{number}", 8, 70)


def test_a_ceiling_holds_for_what_grows(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(
        monkeypatch,
        options={"policy": "fcfs"},
        tenants=True,
        sequences=8,
        blocks=41,
        block_size=4,
        longest=80,
    )
    for number in range(3):
        run.add(f"a-{number}", 8, 60, scalellm_tenant="a", scalellm_kv_ceiling=0.5)
    manager = run.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    most = 0
    while run.scheduler.has_requests():
        run.step()
        most = max(most, sum(map(len, manager.req_to_blocks.values())))
    assert most <= 20 + 3, "a block more for each before it is looked again"
    run.finish()
    for number in range(3):
        assert run.got[f"a-{number}"] == expected(f"a-{number}", 8, 60)


def test_tokens_of_a_minute_that_are_used_up_are_said_so(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(monkeypatch, options={"policy": "fcfs"}, tenants=True)
    mine = {"scalellm_tenant": "a", "scalellm_tokens_per_minute": 60}
    run.add("one", 20, 10, **mine)
    for _ in range(14):
        run.step()
    assert run.got["one"] == expected("one", 20, 10)
    run.add("two", 40, 10, **mine)
    run.step()
    refused = Refused.of(run.ends["two"].stop_reason)
    assert refused is not None
    assert (refused.status, refused.retry_after_s) == (429, 10), "30 are left, 1 comes per second"
    assert "'a' has used up its 60 tokens per minute" in refused.message
    clock.now += 10
    run.add("three", 40, 5, **mine)
    run.finish()
    assert run.got["three"] == expected("three", 40, 5)


def test_prompts_in_the_cache_come_first_inside_a_deficit(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`locality_tokens`: what the cache has is looked up when a request comes."""
    run = Run(
        monkeypatch,
        options={"policy": "fair", "locality_tokens": 500},
        sequences=1,
        block_size=4,
    )
    run.add("same", 40, 4)
    for _ in range(8):
        run.step()
    run.add("busy", 8, 12)
    run.step()
    run.add("other", 20, 4)
    run.scheduler.add_request(run.request("same again", prompt_of="same", prompt=40, most=4))
    run.finish()
    assert list(run.ends) == ["same", "busy", "same again", "other"]
