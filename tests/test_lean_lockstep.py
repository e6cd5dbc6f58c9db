"""The lean step against vLLM's schedulers: the same in every step, or it is not the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402
from vllm.v1.core.sched.interface import PauseState  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

from scalellm_plugins.benchmarks.schedulers import request, scheduler  # noqa: E402
from scalellm_plugins.errors import ConfigError  # noqa: E402
from scalellm_plugins.scheduling.lean import (  # noqa: E402
    LeanAsyncScheduler,
    LeanScheduler,
)
from scalellm_plugins.scheduling.waiting import PolicyQueue  # noqa: E402

from .lean_parts import Driver, plain, said, state  # noqa: E402

PAIRS = {True: (AsyncScheduler, LeanAsyncScheduler), False: (Scheduler, LeanScheduler)}


class Lockstep:
    """vLLM's scheduler and the lean one, given the same."""

    def __init__(self, asynchronous: bool, **options: Any) -> None:
        self.drivers = [
            Driver(scheduler(kind, asynchronous, **options)) for kind in PAIRS[asynchronous]
        ]
        assert self.lean._reason == ""
        self.options = {
            name: options[name] for name in ("block_size", "caching") if name in options
        }
        self.names: list[str] = []
        self.plain_tokens = 0

    @property
    def lean(self) -> LeanScheduler:
        return self.drivers[1].scheduler  # type: ignore[no-any-return]

    def same(self) -> None:
        theirs, ours = (state(driver.scheduler) for driver in self.drivers)
        assert ours == theirs

    def add(self, prompt: list[int], most: int, **others: Any) -> None:
        name = f"request-{len(self.names)}"
        self.names.append(name)
        for driver in self.drivers:
            arrival = float(len(self.names))
            one = request(name, prompt, most, arrival=arrival, **self.options, **others)
            driver.scheduler.add_request(one)

    def abort(self, numbers: list[int]) -> None:
        names = {self.names[number % len(self.names)] for number in numbers if self.names}
        for driver in self.drivers:
            driver.scheduler.finish_requests(sorted(names), RequestStatus.FINISHED_ABORTED)
        self.same()

    def forget_prefixes(self, running: bool) -> None:
        if running and self.drivers[0].under_way:
            return  # vLLM's engine waits for the steps under way
        results = [
            driver.scheduler.reset_prefix_cache(reset_running_requests=running)
            for driver in self.drivers
        ]
        assert results[0] == results[1]
        self.same()

    def pause(self, how: str) -> None:
        for driver in self.drivers:
            driver.scheduler.set_pause_state(PauseState[how])

    def schedule(self) -> bool:
        """Begin a step; whether there is anything to do in it."""
        theirs, ours = (driver.schedule() for driver in self.drivers)
        if kept := self.lean._steps.get(id(ours)):
            self.plain_tokens += len(kept[1])
        assert plain(ours) == plain(theirs)
        self.same()
        return bool(ours.total_num_scheduled_tokens)

    def update(self) -> None:
        theirs, ours = (said(driver.update()) for driver in self.drivers)
        assert ours == theirs
        self.same()

    def step(self, depth: int) -> None:
        """One turn of vLLM's engine with so many steps under way at a time."""
        new = self.schedule()
        if self.drivers[0].under_way and (not new or len(self.drivers[0].under_way) >= depth):
            self.update()

    def finish(self, depth: int) -> None:
        """Until nothing is left, and everything is free."""
        self.pause("UNPAUSED")
        for _ in range(3000):
            if not self.drivers[0].scheduler.has_requests():
                break
            self.step(depth)
        while self.drivers[0].under_way:
            self.update()
        assert not self.drivers[1].scheduler.requests
        assert not self.lean._steps, "nothing is kept of steps that are done"


PROMPTS = st.builds(
    lambda start, length, same: [(start if same else start + n) % 7 for n in range(length)],
    st.integers(0, 6),
    st.one_of(st.integers(1, 12), st.integers(1, 70)),
    st.booleans(),
)
PARAMS = st.one_of(
    st.just({}),
    st.just({}),
    st.just({"ignore_eos": True}),
    st.builds(lambda tokens: {"stop_token_ids": tokens}, st.lists(st.integers(0, 49), max_size=3)),
    st.just({"logprobs": 1}),
    st.just({"min_tokens": 1}),
)
ADD = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
        "most": st.integers(1, 40),
        "client": st.sampled_from([0, 0, 0, 1, 2]),
        "priority": st.integers(0, 2),
        "params": PARAMS,
    }
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), ADD),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("abort"), st.lists(st.integers(0, 30), min_size=1, max_size=3)),
        st.tuples(st.just("forget"), st.booleans()),
        st.tuples(st.just("drain"), st.none()),
        st.tuples(st.just("pause"), st.sampled_from([state.name for state in PauseState])),
    ),
    min_size=1,
    max_size=40,
)
OPTIONS = st.fixed_dictionaries(
    {
        "blocks": st.sampled_from([12, 20, 40, 400]),
        "block_size": st.sampled_from([4, 4, 16]),
        "sequences": st.sampled_from([2, 5, 32]),
        "budget": st.sampled_from([8, 16, 64, 8192]),
        "longest": st.sampled_from([40, 64, 4096]),
        "caching": st.sampled_from([True, True, False]),
        "policy": st.sampled_from(["fcfs", "fcfs", "priority"]),
        "watermark": st.sampled_from([0.0, 0.0, 0.1]),
    }
)


@pytest.mark.parametrize("asynchronous", [True, False])
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_every_step_is_as_vllms(asynchronous: bool, data: st.DataObject) -> None:
    options = data.draw(OPTIONS)
    options["longest"] = min(options["longest"], (options["blocks"] - 1) * options["block_size"])
    options["budget"] = max(options["budget"], options["sequences"])
    depth = data.draw(st.sampled_from([2, 2, 3] if asynchronous else [1]))
    both = Lockstep(asynchronous, **options)
    for what, how in data.draw(ACTIONS):
        if what == "add":
            room = options["longest"] - 1
            prompt = how["prompt"][:room]
            most = min(how["most"], options["longest"] - len(prompt))
            both.add(prompt, most, client=how["client"], priority=how["priority"], **how["params"])
        elif what == "step":
            for _ in range(how):
                both.step(depth)
        elif what == "abort":
            both.abort(how)
        elif what == "forget":
            both.forget_prefixes(how)
        elif what == "pause":
            both.pause(how)
        else:
            while both.drivers[0].under_way:
                both.update()
    both.finish(depth)


# Fair sharing


def fairly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALELLM_CONFIG", '{"scheduler": {"policy": "fair"}}')


@pytest.mark.parametrize("asynchronous", [True, False])
def test_one_tenant_is_served_as_by_vllm(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrivals, preemption, aborts: first come, first served."""
    fairly(monkeypatch)
    both = Lockstep(asynchronous, blocks=24, block_size=4, sequences=6, budget=64, longest=60)
    assert isinstance(both.drivers[1].scheduler.waiting, PolicyQueue)
    for number in range(60):
        both.add([number % 7] * (1 + number % 20), 1 + number % 30, ignore_eos=True)
        both.step(2 if asynchronous else 1)
        if number % 9 == 8:
            both.abort([number, number // 2])
    both.finish(2 if asynchronous else 1)
    assert not both.lean._host._works


def test_who_floods_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sent first, running requests are shared as the weights say while both wait."""
    fairly(monkeypatch)
    driver = Driver(scheduler(LeanAsyncScheduler, True, sequences=6))
    tenants = {"flood": (60, 1.0), "twice": (20, 2.0)}
    for tenant, (requests, weight) in tenants.items():
        for number in range(requests):
            extra = {"scalellm_tenant": tenant, "scalellm_weight": weight}
            one = request(f"{tenant}-{number}", [3] * 40, 30, ignore_eos=True, extra_args=extra)
            driver.scheduler.add_request(one)
    seats: Counter[str] = Counter()
    for step in range(400):
        driver.schedule()
        if len(driver.under_way) > 1:
            driver.update()
        waiting = {one.request_id.partition("-")[0] for one in driver.scheduler.waiting}
        if step > 100 and waiting == {"flood", "twice"}:
            seats.update(one.request_id.partition("-")[0] for one in driver.scheduler.running)
    assert seats.total() > 100
    assert 1.7 < seats["twice"] / seats["flood"] < 2.3


def test_two_orders_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fairly(monkeypatch)
    with pytest.raises(ConfigError, match="--scheduling-policy priority: both say who is next"):
        scheduler(LeanScheduler, False, policy="priority")
