"""Policies in vLLM's scheduler: what they say is done, and nothing else changes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.engine import FinishReason  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

from scalellm_plugins.scheduling.policy import Policy, Verdict, Work  # noqa: E402
from scalellm_plugins.scheduling.refused import Refused  # noqa: E402

from .host_parts import Clock, Run, expected, stop_clocks  # noqa: E402


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return stop_clocks(monkeypatch)


both = pytest.mark.parametrize("asynchronous", [True, False])


@both
def test_the_urgent_takes_a_seat_at_once_and_nothing_is_lost(
    asynchronous: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All seats are taken by less urgent work; what is displaced says the same in the end."""
    run = Run(monkeypatch, asynchronous=asynchronous, sequences=4)
    for number in range(6):
        run.add(f"low-{number}", most=40, priority=5)
    for _ in range(10):
        run.step()
    assert len(run.running()) == 4
    run.add("urgent", priority=1, most=20)
    output = run.step()
    assert "urgent" in output.num_scheduled_tokens, "not a step later"
    assert len(run.running()) == 4
    assert "low-3" not in run.running(), "of equals the latest gives way"
    assert run.running()[0] == "urgent", "and is the last to go when blocks run out"
    run.finish()
    for number in range(6):
        assert run.got[f"low-{number}"] == expected(f"low-{number}", 8, 40)
    assert run.got["urgent"] == expected("urgent", 8, 20)


def test_each_of_several_takes_a_seat_of_its_own(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one step, and no more give way than are needed."""
    run = Run(monkeypatch, sequences=4)
    for number in range(4):
        run.add(f"low-{number}", most=40, priority=5)
    for _ in range(4):
        run.step()
    for number in range(3):
        run.add(f"urgent-{number}", most=5, priority=1)
    run.step()
    assert sorted(run.running()) == ["low-0", "urgent-0", "urgent-1", "urgent-2"]
    run.finish()


@both
def test_equals_do_not_displace_each_other(
    asynchronous: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(monkeypatch, asynchronous=asynchronous, sequences=2)
    for number in range(3):
        run.add(f"low-{number}", most=30, priority=5)
        run.step()
    run.add("equal", priority=5)
    run.add("lower", priority=9)
    run.step()
    assert run.running() == ["low-0", "low-1"]
    run.finish()


def test_room_is_made_in_blocks_too(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are seats, but no blocks: whoever gives way must have enough of them."""
    run = Run(monkeypatch, sequences=8, blocks=13, block_size=4, longest=48)
    run.add("low-a", 18, 20, priority=5)
    run.add("low-b", 18, 20, priority=5)
    for _ in range(4):
        run.step()
    assert len(run.running()) == 2
    run.add("urgent", 12, 4, priority=0)
    output = run.step()
    assert "urgent" in output.num_scheduled_tokens
    assert run.running() == ["urgent", "low-a"]
    run.finish()
    assert run.got["low-b"] == expected("low-b", 18, 20)


def test_nobody_gives_way_in_vain(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, sequences=8, blocks=13, block_size=4, longest=48)
    run.add("same", 30, 16, priority=0)
    run.add("low", 4, 16, priority=5)
    for _ in range(4):
        run.step()
    run.add("urgent", 20, 4, priority=0)  # more than "low" has
    run.step()
    assert run.running() == ["same", "low"]
    run.finish()


def test_who_waits_long_enough_has_its_turn(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Always more urgent work than seats: the other waits a bounded time, and keeps its seat."""
    run = Run(monkeypatch, sequences=2, options={"policy": "priority", "ageing_s": 10})
    run.add("first", most=3, priority=0)
    run.add("second", most=3, priority=0)
    run.step()
    run.add("low", most=60, priority=3)
    began = None
    for number in range(400):
        if len(run.scheduler.waiting) < 3:
            run.add(f"urgent-{number}", most=6, priority=0)
        run.step()
        clock.now += 0.5
        if began is None and "low" in run.running():
            began = clock.now - 1000.0
        elif began is not None and "low" not in run.running():
            break
    assert began is not None
    assert 30.0 <= began < 36.0, "three classes in three times ten seconds, then the next seat"
    assert run.got["low"] == expected("low", 8, 60)
    assert run.scheduler.requests, "there was always more urgent work"
    run.finish()


def test_who_was_displaced_is_not_displaced_again_at_once(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(monkeypatch, sequences=1, options={"policy": "priority", "min_run_s": 5})
    run.add("low", most=200, priority=5)
    run.step()
    times = []
    for number in range(40):
        run.add(f"urgent-{number}", most=2, priority=0)
        for _ in range(6):
            before = run.scheduler.requests["low"].num_preemptions
            run.step()
            clock.now += 0.1
            if run.scheduler.requests["low"].num_preemptions > before:
                times.append(clock.now)
    assert len(times) >= 2
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert min(pauses) >= 5.0, "and longer each time"
    assert pauses == sorted(pauses)


# What other policies may say


class Doubt(Policy):
    """Gives up whatever asks for one token, if it waits."""

    gives_up = True
    drop = True

    def hopeless(self, work: Work, now: float) -> Verdict | None:
        return Verdict("it is too late", drop=self.drop) if work.most == 1 else None

    def group(self, work: Work) -> bool:
        return work.demoted

    def first(self, heads: Any, now: float) -> bool:
        return min(heads)


@both
def test_what_is_given_up_ends_with_its_reason(
    asynchronous: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(monkeypatch, Doubt, asynchronous=asynchronous, sequences=2)
    run.add("late", most=1)
    run.step()
    assert run.ends["late"].finish_reason is FinishReason.ERROR
    assert Refused.of(run.ends["late"].stop_reason) == Refused(504, "it is too late")
    run.add("fine", most=5)
    run.add("late too", most=1)
    run.finish()
    assert run.got["fine"] == expected("fine", 8, 5)
    assert run.got["late too"] == []
    assert not run.scheduler.has_requests()


def test_what_is_demoted_comes_last(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doubt, "drop", False)
    run = Run(monkeypatch, Doubt, sequences=1)
    for name, most in (("late", 1), ("one", 3), ("two", 3)):
        run.add(name, most=most)
    run.finish()
    assert list(run.ends) == ["one", "two", "late"]


def test_terms_that_are_not_valid_are_refused_in_the_engine_too(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under vLLM's own API servers nobody has looked at them before."""
    run = Run(monkeypatch)
    run.add("bad", scalellm_deadline_ms=-5)
    run.add("good", scalellm_deadline_ms=5)
    run.finish()
    refused = Refused.of(run.ends["bad"].stop_reason)
    assert refused is not None
    assert refused.status == 400
    assert "scalellm_deadline_ms: -5" in refused.message
    assert run.got["good"] == expected("good", 8, 10)


class Resting(Policy):
    """Every other step the first that runs rests."""

    yields = True
    steps = 0

    def resting(self, running: Sequence[Work], now: float) -> Collection[Work]:
        self.steps += 1
        return running[:1] if len(running) > 1 and self.steps % 2 else ()


@both
def test_who_rests_gets_no_token_and_keeps_its_place(
    asynchronous: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(monkeypatch, Resting, asynchronous=asynchronous, sequences=3)
    for name in ("a", "b", "c", "d"):
        run.add(name, most=30)
    run.step()
    seen = []
    for _ in range(20):
        output = run.step()
        seen.append(frozenset(output.num_scheduled_tokens))
        assert run.running() == ["a", "b", "c"], "the place of who rests is not given away"
    assert set(seen) == {frozenset("abc"), frozenset("bc")}
    run.finish()
    for name in ("a", "b", "c", "d"):
        assert run.got[name] == expected(name, 8, 30)


# Steps: how long they take, and what of prompts they may take


class Hurried(Policy):
    """Wants short steps while anything is decoded."""

    paces = True

    def step_s(self, running: Sequence[Work], now: float) -> float | None:
        return 0.001


@pytest.mark.parametrize("by_policy", [True, False])
def test_prompts_get_what_keeps_decodes_at_their_pace(
    by_policy: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are learnt to take 0.1 ms per token: of a long prompt ten tokens' worth goes into one,
    in whole blocks, and behind the decodes, whoever came first."""
    options = {"policy": "fair"} if by_policy else {"tpot_target_ms": 1}
    run = Run(
        monkeypatch,
        Hurried if by_policy else None,
        options=options,
        asynchronous=False,
        block_size=4,
        budget=512,
    )
    monkeypatch.setattr(
        type(run.scheduler._host.times),
        "predict",
        lambda _self, prefill, decodes, _context: 1e-4 * (prefill + decodes),
    )
    run.add("short", 4, 60)
    run.step()
    run.add("long", 200, 4)
    run.scheduler.running.reverse()
    chunks = []
    for _ in range(4):
        tokens = run.step().num_scheduled_tokens
        assert tokens["short"] == 1
        chunks.append(tokens["long"])
        run.scheduler.running.reverse()  # even if it stood first
    assert max(chunks) <= 16, "a thirty-second of a step, or what takes a millisecond"
    run.finish()
    assert run.got["long"] == expected("long", 200, 4)


@both
def test_a_policy_knows_how_long_steps_take_and_who_has_a_token(
    asynchronous: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int, float]] = []
    run = Run(monkeypatch, Doubt, asynchronous=asynchronous)
    host_ = run.scheduler._host
    monkeypatch.setattr(
        type(host_.times), "observe", lambda _self, *shape: seen.append(shape), raising=True
    )
    run.add("one", 20, 30)
    for _ in range(8):
        run.step()
        clock.now += 0.02
    work = host_._works["one"]
    assert work.first is not None
    assert 1000.0 < work.first <= 1000.06
    assert work.since == 1000.0
    assert seen[0][:3] == (20, 0, 20), "the prompt, and nothing beside it"
    assert all((prefill, decodes) == (0, 1) for prefill, decodes, *_ in seen[1:])
    contexts = [context for _, _, context, _ in seen[1:]]
    assert contexts == list(range(21, 21 + len(contexts)))
    steady = [seconds for *_, seconds in seen[2:]]
    assert steady == pytest.approx([0.02] * len(steady) if asynchronous else [0.0] * len(steady))


# Anything at all


class Chaos(Policy):
    """Says anything that a policy may say."""

    preempts = ranks = gives_up = yields = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.random = random.Random(1)

    def group(self, work: Work) -> Any:
        return work.priority, work.demoted

    def order(self, work: Work) -> Any:
        return -work.prompt

    def first(self, heads: Any, now: float) -> Any:
        return max(heads, key=lambda group: (hash((group, now)), group))

    def victim(self, work: Work, running: Sequence[Work], now: float) -> Work | None:
        return self.random.choice(running) if running and self.random.random() < 0.3 else None

    def rank(self, work: Work, now: float) -> Any:
        return hash((work.id, now))

    def hopeless(self, work: Work, now: float) -> Verdict | None:
        if self.random.random() > 0.05:
            return None
        return Verdict("chance", drop=self.random.random() < 0.5)

    def resting(self, running: Sequence[Work], now: float) -> Collection[Work]:
        some = [one for one in running if self.random.random() < 0.3]
        return some if len(some) < len(running) else ()


ARRIVAL = st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(0, 3), st.integers(0, 6))


@both
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    arrivals=st.lists(ARRIVAL, min_size=1, max_size=30),
    blocks=st.sampled_from([24, 40, 400]),
    sequences=st.sampled_from([1, 3, 16]),
    aborts=st.lists(st.integers(0, 29), max_size=4),
)
def test_whatever_a_policy_says_everything_ends_whole(
    asynchronous: bool,
    arrivals: list[tuple[int, int, int, int]],
    blocks: int,
    sequences: int,
    aborts: list[int],
) -> None:
    """Tokens as if undisturbed, every block free, nothing remembered; or its error, or aborted."""
    with pytest.MonkeyPatch.context() as patch:
        clock = stop_clocks(patch)
        run = Run(
            patch,
            Chaos,
            asynchronous=asynchronous,
            sequences=sequences,
            blocks=blocks,
            block_size=4,
            budget=32,
            longest=76,
        )
        aborted = set()
        for number, (prompt, most, priority, pause) in enumerate(arrivals):
            run.add(str(number), prompt, most, priority=priority)
            for _ in range(pause):
                run.step()
                clock.now += 0.02
            if number in aborts:
                aborted.add(str(number))
                run.scheduler.finish_requests([str(number)], RequestStatus.FINISHED_ABORTED)
        for _ in range(4000):
            if not (run.scheduler.has_requests() or run.driver.under_way):
                break
            run.step()
            clock.now += 0.02
        run.finish()
        for number, (prompt, most, _, _) in enumerate(arrivals):
            name = str(number)
            end = run.ends.get(name)
            if end is None:
                assert name in aborted
            elif end.finish_reason is FinishReason.ERROR:
                assert Refused.of(end.stop_reason) == Refused(504, "chance")
                assert not run.got[name], "only what nobody reads yet is given up"
            else:
                assert run.got[name] == expected(name, prompt, most)
