"""The virtual engine that policies are tested on: right about time, and strict with policies."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings

from scalellm_plugins.scheduling.policy import Policy, Stack, Work
from scalellm_plugins.simulator.ideal import Batching, Request
from scalellm_plugins.simulator.ideal import run as ideal_run

from .policy_asks import Ask, workloads
from .policy_parts import H200, VirtualHost, conform, engine, make

SMALL = [Ask(0.0, 50 + 7 * n, 5 + 3 * n) for n in range(16)]
BATCH = [Ask(0.0, 100 + 37 * n % 900, 5 + 13 * n % 80) for n in range(60)]


def test_first_come_first_served_takes_as_long_as_the_ideal_run() -> None:
    """The same engine written twice: a step's parts, chunks and the order of admission."""
    of = engine(seats=16, step_tokens=512)
    found = VirtualHost(make(Policy, of)).run(BATCH)
    requests = [Request(ask.prompt, ask.output) for ask in BATCH]
    ideal = ideal_run(requests, len(BATCH), H200, Batching(512, 16))
    assert found.steps == ideal.steps
    assert found.seconds == pytest.approx(ideal.seconds, rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(workloads)
def test_everything_ends_first_come_first_served(asks: list[Ask]) -> None:
    run = conform(Policy, asks)
    starts = [one for one in run.outcomes if not one.work.preemptions]
    assert all(one.error is None for one in run.outcomes)
    assert all(one.starts == 1 for one in starts)


def test_without_room_the_last_one_is_preempted_and_ends_all_the_same() -> None:
    of = engine(seats=4, step_tokens=64, blocks=16)
    run = VirtualHost(make(Policy, of)).run([Ask(0.0, 60, 100) for _ in range(4)])
    assert run.preemptions > 0
    assert run.outcomes[0].work.preemptions == 0
    assert all(one.work.made == 100 for one in run.outcomes)


class Forgetful(Policy):
    """Its order depends on what happens while work waits."""

    asked = 0

    def order(self, work: Work) -> Any:
        self.asked += 1
        return self.asked


class Counting(Policy):
    """Counts turns where it must not."""

    turns = 0

    def first(self, heads: Mapping[Hashable, Work], now: float) -> Hashable:
        self.turns += 1
        return super().first(heads, now)


class Lazy(Policy):
    """Has all of them rest."""

    yields = True

    def resting(self, running: Sequence[Work], now: float) -> Collection[Work]:
        return running


class Elsewhere(Policy):
    """Names a group that does not wait."""

    def first(self, heads: Mapping[Hashable, Work], now: float) -> Hashable:
        return "nobody"


class Ruthless(Policy):
    """Has work give way that does not run."""

    preempts = True

    def victim(self, work: Work, running: Sequence[Work], now: float) -> Work | None:
        return work


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Forgetful, "the order of"),
        (Counting, "changed the policy's state"),
        (Lazy, "all rest"),
        (Elsewhere, "no group that waits"),
        (Ruthless, "does not run"),
    ],
)
def test_policies_that_do_what_they_must_not_are_found(kind: type[Policy], what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        conform(kind, SMALL)


def test_of_several_paces_the_shortest_step_counts() -> None:
    class Paced(Policy):
        paces = True
        name = "paced"

        def __init__(self, *args: Any, step: float | None) -> None:
            super().__init__(*args)
            self._step = step

        def step_s(self, running: Sequence[Work], now: float) -> float | None:
            return self._step

    plain = make(Policy)
    paced = [Paced(plain.engine, plain.options, step=step) for step in (None, 0.03, 0.02)]
    assert Stack([plain, *paced]).paces
    assert Stack([plain, *paced]).step_s([], 0.0) == 0.02
    assert Stack([plain, paced[0]]).step_s([], 0.0) is None
