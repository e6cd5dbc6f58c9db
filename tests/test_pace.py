"""Who rests so that others keep their pace, and how long steps may take: on streams made up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm_plugins.scheduling.pace import AIM, EASY_TPOT_S, LOST, Pace
from scalellm_plugins.scheduling.policy import Work
from scalellm_plugins.scheduling.step_times import StepTimes
from scalellm_plugins.simulator.roofline import Roofline, gpu_preset, model_preset

H200 = Roofline(gpu_preset("h200"), model_preset("8b"))


def learnt() -> StepTimes:
    """Decoding on an H200: 5 ms, and 39 ns per token of context."""
    times = StepTimes()
    for number in range(400):
        decodes = 1 + number * 7 % 64
        context = decodes * (100 + number * 997 % 30_000)
        times.observe(0, decodes, context, H200.step_seconds(0, decodes, context))
    return times


TIMES = learnt()


def stream(
    name: str, context: int, tpot: float | None, *, ahead: float = 0.0, most: int = 1000
) -> Work:
    """A stream with 100 tokens, whose last is just there, `ahead` s ahead of its pace at 0."""
    work = Work(name, prompt=context - 99, most=most)
    work.tpot = tpot
    work.made, work.computed, work.since = 100, context, -10.0
    work.first = ahead - 99 * AIM * (tpot or 0.0)
    return work


def rests(running: list[Work], now: float = 0.0, share: float = 1.0) -> set[str]:
    return {work.id for work in Pace(TIMES).resting(running, share, now)}


LONG = 30_000
"""Twenty of them make a step 23 ms longer."""


def test_streams_ahead_rest_for_one_that_cannot_keep_up() -> None:
    ahead = [stream(f"long{n}", LONG, 0.2, ahead=2.0) for n in range(20)]
    behind = stream("short", 300, 0.015)
    found = rests([*ahead, behind])
    assert found
    assert "short" not in found
    left = [work for work in [*ahead, behind] if work.id not in found]
    step = TIMES.predict(0, len(left), sum(work.computed for work in left))
    assert step <= 0.015
    # No more than it takes.
    assert TIMES.predict(0, len(left) + 1, sum(w.computed for w in left) + LONG) > 0.015 * AIM


def test_nobody_rests_who_is_not_ahead() -> None:
    level = [stream(f"long{n}", LONG, 0.03) for n in range(20)]
    assert not rests([*level, stream("short", 300, 0.015)])


def test_nobody_rests_if_the_step_is_hardly_shorter() -> None:
    """Short contexts: reading the weights takes as long for one as for all."""
    ahead = [stream(f"s{n}", 300, 0.2, ahead=2.0) for n in range(20)]
    assert not rests([*ahead, stream("fast", 300, 0.0045)])


def test_nobody_rests_if_the_pace_is_lost_anyway() -> None:
    ahead = [stream(f"long{n}", LONG, 0.2, ahead=2.0) for n in range(20)]
    assert rests([*ahead, stream("short", 300, 0.015, ahead=-0.1)])
    assert not rests([*ahead, stream("short", 300, 0.015, ahead=-5.0)])


def test_nobody_rests_for_what_will_be_made_up() -> None:
    ahead = [stream(f"long{n}", LONG, 0.2, ahead=2.0) for n in range(20)]
    late = stream("short", 300, 0.05, ahead=-0.2)
    assert not rests([*ahead, late])
    # With ten tokens left, there is no time for that.
    late.most = 110
    assert rests([*ahead, late])


def test_nobody_rests_who_would_end_too_late() -> None:
    ahead = [stream(f"long{n}", LONG, None) for n in range(20)]
    short = stream("short", 300, 0.015)
    assert len(rests([*ahead, short])) > 10
    for work in ahead:
        work.due = 900 * TIMES.predict(0, 21, 20 * LONG + 300)
    assert not rests([*ahead, short])
    # Not as much as it may generate, but as others did.
    assert rests([*ahead, short], share=0.5)


def test_resting_ends_before_a_token_takes_longer_than_its_pace() -> None:
    """However far ahead: nobody wants to see nothing for a minute."""
    for tpot in (0.2, None):
        pace = Pace(TIMES)
        ahead = [stream(f"long{n}", LONG, tpot, ahead=100.0) for n in range(20)]
        last = dict.fromkeys([work.id for work in ahead], 0.0)
        longest = now = 0.0
        for _ in range(400):
            running = [*ahead, stream("short", 300, 0.015, ahead=now)]
            found = set(pace.resting(running, 1.0, now))
            left = [work for work in running if work not in found]
            now += TIMES.predict(0, len(left), sum(work.computed for work in left))
            for work in ahead:
                if work not in found:
                    longest = max(longest, now - last[work.id])
                    last[work.id] = now
        assert 0.05 < longest <= (tpot or EASY_TPOT_S) + 1e-9


def test_without_targets_nobody_rests_and_steps_take_their_time() -> None:
    running = [stream(f"long{n}", LONG, None) for n in range(20)]
    assert not rests(running)
    assert Pace(TIMES).step_s(running, 1.0, 0.0) is None


def test_a_step_may_take_what_the_tightest_stream_can_afford() -> None:
    running = [stream("a", 500, 0.05), stream("b", 500, 0.03), stream("c", 500, None)]
    found = Pace(TIMES).step_s(running, 1.0, 0.0)
    assert found is not None
    assert abs(found - 0.03 * AIM) < 1e-9
    # What cannot be kept holds prompts back by a little.
    running.append(stream("d", 500, 0.001))
    lost = Pace(TIMES).step_s(running, 1.0, 0.0)
    assert lost == LOST * TIMES.predict(0, 4, 2000)
    running.pop()
    # One that is ahead has time.
    running[1] = stream("b", 500, 0.03, ahead=1.0)
    more = Pace(TIMES).step_s(running, 1.0, 0.0)
    assert more is not None
    assert more > found


def test_a_step_may_take_what_answers_that_are_due_can_afford() -> None:
    work = stream("a", 500, None, most=500)
    work.due = 4.0
    found = Pace(TIMES).step_s([work], 1.0, 0.0)
    assert found == 4.0 / 400


streams = st.builds(
    stream,
    st.uuids().map(str),
    st.integers(100, 60_000),
    st.none() | st.floats(0.001, 0.3),
    ahead=st.floats(-5, 5),
    most=st.integers(101, 3000),
)


@settings(deadline=None)
@given(st.lists(streams, min_size=1, max_size=40), st.floats(0, 1), st.floats(0, 0.5))
def test_resting_helps_somebody_and_hurts_nobody(
    running: list[Work], share: float, now: float
) -> None:
    found = list(Pace(TIMES).resting(running, share, now))
    assert len(found) == len({work.id for work in found}) < len(running)
    if not found:
        return
    left = [work for work in running if work not in found]
    step = TIMES.predict(0, len(running), sum(work.computed for work in running))
    shorter = TIMES.predict(0, len(left), sum(work.computed for work in left))
    assert shorter < step
    for work in found:
        if work.tpot is not None and work.first is not None:
            # It rests in this step, and has its token in the next.
            assert now + shorter + step <= work.first + work.tpot * work.made
