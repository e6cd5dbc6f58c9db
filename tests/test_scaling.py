"""How many workers there should be: in virtual time, and without processes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.frontends.scaling import CrashLoop, Decision, ScalingPolicy

TICK_S = 0.25


class Simulated:
    """Workers that share a load (in whole busy workers), and start within `start_s`."""

    def __init__(self, minimum: int, maximum: int, start_s: float = 0.5) -> None:
        self.policy = ScalingPolicy(minimum, maximum)
        self.workers = minimum
        self.coming: list[float] = []
        self.start_s = start_s
        self.now = 0.0
        self.decisions: list[tuple[float, Decision]] = []

    def run(self, seconds: float, load: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            arrived = [due for due in self.coming if due <= self.now]
            self.coming = [due for due in self.coming if due > self.now]
            self.workers += len(arrived)
            share = min(1.0, load / self.workers)
            decision = self.policy.observe(self.now, [share] * self.workers, len(self.coming))
            if decision == "grow":
                self.coming.append(self.now + self.start_s)
            elif decision == "shrink":
                self.workers -= 1
            if decision:
                self.decisions.append((self.now, decision))


@given(
    bounds=st.tuples(st.integers(1, 4), st.integers(0, 4)),
    phases=st.lists(st.tuples(st.floats(0.25, 90), st.floats(0, 8)), max_size=8),
)
def test_the_number_of_workers_stays_within_its_bounds(
    bounds: tuple[int, int], phases: list[tuple[float, float]]
) -> None:
    minimum, maximum = bounds[0], sum(bounds)
    server = Simulated(minimum, maximum)
    for seconds, load in phases:
        server.run(seconds, load)
        assert minimum <= server.workers + len(server.coming) <= maximum


@given(minimum=st.integers(1, 3), extra=st.integers(0, 5), load=st.floats(0, 8))
def test_under_a_steady_load_it_settles_and_then_rests(
    minimum: int, extra: int, load: float
) -> None:
    """Hysteresis: no load makes it add and remove the same worker forever."""
    server = Simulated(minimum, minimum + extra)
    server.run(600, load)
    settled = len(server.decisions)
    server.run(600, load)
    assert len(server.decisions) == settled
    limits = server.policy.thresholds
    if server.workers < minimum + extra:
        assert load / server.workers <= limits.grow_above + 1e-9
    # And it never went back and forth on the way.
    assert {decision for _, decision in server.decisions} <= {"grow"}


def test_growth_takes_a_second_and_not_a_blip() -> None:
    server = Simulated(1, 4)
    for _ in range(20):
        server.run(0.75, 1.0)
        server.run(0.25, 0.5)
    assert server.workers == 1
    server.run(2.0, 1.0)
    assert server.workers == 2


def test_shrinking_takes_half_a_minute_of_quiet_without_a_break() -> None:
    server = Simulated(1, 2)
    server.run(3, 2.0)
    assert server.workers == 2
    server.run(29, 0.1)
    server.run(1, 1.3)  # not busy enough to grow, too busy to shrink
    server.run(29, 0.1)
    assert server.workers == 2
    server.run(2, 0.1)
    assert server.workers == 1


def test_the_next_decision_waits_for_the_effect_of_the_last() -> None:
    server = Simulated(1, 8, start_s=10.0)
    server.run(100, 8.0)
    assert server.workers == 8
    times = [at for at, _ in server.decisions]
    assert min(later - at for at, later in itertools.pairwise(times)) >= server.start_s


def test_a_missing_worker_is_brought_back_at_once() -> None:
    policy = ScalingPolicy(3, 4)
    assert policy.observe(0.0, [0.0, 0.0]) == "grow"
    assert policy.observe(0.25, [0.0, 0.0], coming=1) is None


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_a_crash_loop_backs_off_and_is_given_up(patience: int) -> None:
    crashes = CrashLoop(patience=patience, settled_after_s=3.0)
    waits = [crashes.died(served_s=0.0) for _ in range(patience)]
    assert waits[-1] is None
    delays = [wait for wait in waits[:-1] if wait is not None]
    assert len(delays) == patience - 1
    assert delays[:1] in ([], [0.0])
    assert delays == sorted(set(delays))


def test_a_good_run_forgives_what_was_before() -> None:
    crashes = CrashLoop(patience=3, settled_after_s=3.0)
    assert [crashes.died(served_s=0.1), crashes.died(served_s=0.1)] == [0.0, 0.5]
    assert crashes.died(served_s=3.0) == 0.0
    assert [crashes.died(served_s=0.1), crashes.died(served_s=0.1)] == [0.5, None]
