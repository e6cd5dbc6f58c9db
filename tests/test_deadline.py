"""Deadlines: least slack first, nothing done for what is lost, nothing lost while there is time.

The proofs run in virtual time on a simulated H200 with an 8B model, 64 seats.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping

import pytest
from hypothesis import given, settings

from scalellm_plugins.scheduling.deadline import PATIENCE_S, UNHURRIED_SHARE, Deadline
from scalellm_plugins.scheduling.forecast import RECENT, Forecast
from scalellm_plugins.scheduling.policy import Engine, Policy, Stack, Work

from .policy_asks import Ask, Outcome, lengths, poisson, workloads
from .policy_parts import H200, Run, VirtualHost, conform, engine, make, sustainable


class Classes(Policy):
    """Strict priority by static class, first come, first served within: vLLM's `priority`."""

    name = "classes"

    def group(self, work: Work) -> Hashable:
        return work.priority

    def first(self, heads: Mapping[Hashable, Work], now: float) -> Hashable:
        return min(heads)  # type: ignore[type-var]


Maker = Callable[[random.Random, float], Ask]


def chat(urgent: float) -> Maker:
    """A share of people who wait (class 0, a first token within 1 s), and others (5 s)."""

    def ask(chance: random.Random, at: float) -> Ask:
        first = chance.random() < urgent
        return Ask(
            at,
            lengths(chance, 512, 4096),
            lengths(chance, 128, 1024),
            most=1024,
            priority=0 if first else 1,
            ttft=1.0 if first else 5.0,
            tpot=0.05 if first else 0.1,
        )

    return ask


def documents(chance: random.Random, at: float) -> Ask:
    """Long prompts, short answers, whose pace prompts would break."""
    output = lengths(chance, 100, 512)
    return Ask(at, lengths(chance, 3000, 16_000), output, most=1024, ttft=3.0, tpot=0.03)


def serve(kind: type[Policy], asks: list[Ask], of: Engine | None = None, **options: str) -> Run:
    run = VirtualHost(make(kind, of or engine(), **options), noise=0.03).run(asks)
    assert all((one.finished is None) == bool(one.error) for one in run.outcomes)
    return run


def of_tenant(name: str) -> Callable[[Outcome], bool]:
    return lambda one: one.ask.tenant == name


# At 1.5 × sustainable load


@pytest.mark.parametrize("late", ["drop", "demote"])
@pytest.mark.parametrize(("urgent", "seed"), [(0.8, 1), (0.8, 2), (1.0, 3)])
def test_overloaded_it_serves_twice_as_many_in_time(urgent: float, seed: int, late: str) -> None:
    ask = chat(urgent)
    asks = poisson(1.5 * sustainable(ask), 40, ask, seed)
    found = serve(Deadline, asks, late=late).attained()
    assert found > 0.6  # two thirds is what can be served
    assert found > 2 * serve(Policy, asks).attained()
    assert found > 2 * serve(Classes, asks).attained()


def test_where_classes_hold_it_is_better_still() -> None:
    """Half of the load is urgent: priority serves that half, and hardly anything else."""
    asks = poisson(1.5 * sustainable(chat(0.5)), 40, chat(0.5), 4)
    assert serve(Deadline, asks).attained() > 1.25 * serve(Classes, asks).attained()


def test_overloaded_with_long_prompts_streams_keep_their_pace() -> None:
    rate = sustainable(documents, lambda: engine(step_tokens=8192), count=200)
    asks = poisson(1.5 * rate, 60, documents, 3)
    found = serve(Deadline, asks, engine(step_tokens=8192))
    assert found.attained() > 0.6
    assert found.attained() > 4 * serve(Policy, asks, engine(step_tokens=8192)).attained()
    served = [one for one in found.outcomes if one.finished is not None]
    assert sum(one.met for one in served) > 0.9 * len(served)


def test_overloaded_with_few_blocks_it_holds_as_well() -> None:
    def small() -> Engine:
        return engine(seats=128, blocks=2500)

    asks = poisson(1.5 * sustainable(chat(0.8), small), 40, chat(0.8), 5)
    found = serve(Deadline, asks, small())
    assert found.preemptions > 0
    assert found.attained() > 2 * serve(Policy, asks, small()).attained()
    assert found.attained() > 0.6


# At light load


@pytest.mark.parametrize("load", [0.3, 0.5])
def test_at_light_load_nothing_is_lost(load: float) -> None:
    ask = chat(0.8)
    asks = poisson(load * sustainable(ask), 60, ask, 6)
    plain, found = serve(Policy, asks), serve(Deadline, asks)
    assert plain.attained() == found.attained() == 1.0
    assert found.preemptions == found.rests == 0
    for one, other in zip(plain.outcomes, found.outcomes, strict=True):
        # Two that come together may change places: a prompt of 4,096 tokens is 0.1 s.
        assert abs(one.ttft - other.ttft) < 0.1
        assert abs((one.finished or 0.0) - (other.finished or 0.0)) < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_at_light_load_what_can_be_made_is_not_dropped(seed: int) -> None:
    """Targets as tight as twice what the prompt takes by itself, and a step before it."""

    def tight(chance: random.Random, at: float) -> Ask:
        prompt = lengths(chance, 512, 4096)
        alone = H200.step_seconds(prompt, 0, prompt, prefill_pairs=prompt**2 // 2)
        return Ask(at, prompt, lengths(chance, 128, 1024), most=1024, ttft=0.02 + 2 * alone)

    asks = poisson(0.1 * sustainable(tight), 60, tight, seed)
    plain, found = serve(Policy, asks), serve(Deadline, asks)
    for one, other in zip(plain.outcomes, found.outcomes, strict=True):
        assert other.error is None or not one.met
    assert found.attained() >= plain.attained() > 0.95


# One by one


def alone(**targets: float) -> Outcome:
    """A request by itself, after others that taught the policy what steps take."""
    lessons = [Ask(0.3 * n, 2000, 20) for n in range(30)]
    run = serve(Deadline, [*lessons, Ask(30.0, 4000, 20, **targets)])  # type: ignore[arg-type]
    return run.outcomes[-1]


def test_what_cannot_be_made_even_alone_is_dropped_at_once_and_told_why() -> None:
    error = alone(ttft=0.05).error
    assert error is not None
    assert error.startswith("deadline: the first token cannot come within 50 ms any more (waited ")
    assert "scalellm_ttft_ms" in error
    error = alone(due=0.06).error
    assert error is not None
    assert "the answer cannot end within 60 ms any more" in error
    assert "scalellm_deadline_ms" in error
    assert alone(ttft=0.15).met
    assert alone(due=0.4).met


def test_demoted_work_runs_when_nobody_else_waits() -> None:
    asks = [Ask(n / 10, 500, 400, ttft=60.0) for n in range(20)]
    asks[5] = Ask(0.5, 4000, 400, ttft=0.01)
    run = serve(Deadline, asks, engine(seats=2), late="demote")
    late = run.outcomes[5]
    assert late.work.demoted
    others = [one.work.since or 0.0 for one in run.outcomes if one is not late]
    assert late.work.since is not None
    assert late.work.since >= max(others)
    assert late.finished is not None


def policy(of: Engine | None = None) -> Deadline:
    made = make(Deadline, of)
    assert isinstance(made, Deadline)
    return made


def work(name: str, arrival: float = 0.0, **notes: float) -> Work:
    made = Work(name, arrival=arrival, prompt=100, most=100)
    for key, value in notes.items():
        setattr(made, key, value)
    return made


def test_whoever_must_start_first_is_next() -> None:
    of = policy()
    for number in range(50):
        tokens = 100 + 50 * number
        of.engine.times.observe(tokens, 0, tokens, 0.01 + tokens * 1e-4)
    loose, tight = work("loose", 0.0, ttft=5.0), work("tight", 1.0, ttft=0.5)
    long = work("long", 0.9, ttft=0.7)
    long.prompt = 2000
    due = work("due", 0.0, due=1.2)
    waiting = [loose, tight, long, due]
    for one in waiting:
        of.arrived(one, (), 1.0)
    assert [one.id for one in sorted(waiting, key=of.order)] == ["due", "long", "tight", "loose"]
    assert len({of.group(one) for one in waiting}) == 1


def test_work_without_targets_waits_for_such_with_until_its_patience_ends() -> None:
    of = policy()
    free, timed = work("free"), work("timed", PATIENCE_S - 2, ttft=1.0)
    late = work("late", PATIENCE_S + 5, ttft=1.0)
    for one in (free, timed, late):
        of.arrived(one, (), one.arrival)
    heads = {of.group(free): free, of.group(timed): timed}
    assert of.first(heads, PATIENCE_S - 2) == of.group(timed)
    of.admitted(timed, PATIENCE_S - 2)
    heads[of.group(timed)] = late
    assert of.first(heads, PATIENCE_S + 5) == of.group(free)


def flood(chance: random.Random, at: float) -> Ask:
    """Chats, and as many documents without targets as there is room for and more."""
    if chance.random() < 0.2:
        output = lengths(chance, 64, 1024)
        return Ask(at, lengths(chance, 512, 4096), output, ttft=1.0, tpot=0.05, tenant="chat")
    return Ask(at, lengths(chance, 3000, 4096), lengths(chance, 16, 4096), tenant="batch")


def test_a_flood_without_targets_does_not_push_aside_those_that_have_some() -> None:
    """It has lost its patience for most of the time, all of it."""
    asks = poisson(3 * sustainable(flood), 60, flood, 7)
    run = serve(Deadline, asks)
    assert run.attained(of_tenant("chat")) > 0.98
    assert all(one.error is None for one in run.outcomes if one.ask.tenant == "batch")


def test_a_flood_with_targets_leaves_a_share_to_work_without() -> None:
    def ask(chance: random.Random, at: float) -> Ask:
        if chance.random() < 0.8:
            return Ask(at, 2000, 32, ttft=1.0, tenant="chat")
        return Ask(at, 1000, 16, tenant="batch")

    asks = poisson(3 * sustainable(ask), 80, ask, 8)
    run = serve(Deadline, asks)
    end = asks[-1].at
    early = [one for one in run.outcomes if one.finished is not None and one.finished < end]
    tokens = {
        name: sum(one.ask.prompt for one in early if one.ask.tenant == name)
        for name in ("chat", "batch")
    }
    # Its patience ends after 30 of 80 s.
    assert tokens["batch"] > 0.5 * UNHURRIED_SHARE * tokens["chat"]
    assert tokens["batch"] < 1.5 * UNHURRIED_SHARE * tokens["chat"]


class Patient(Deadline):
    """Without preemption."""

    preempts = False


def long_answers(chance: random.Random, at: float) -> Ask:
    """Chats, and answers without targets that hold most of the seats."""
    if chance.random() < 0.7:
        output = lengths(chance, 128, 1024)
        return Ask(at, lengths(chance, 512, 4096), output, ttft=0.5, tenant="chat")
    return Ask(at, lengths(chance, 512, 4096), lengths(chance, 1500, 4096), tenant="batch")


def test_running_work_without_targets_gives_its_seat_to_work_about_to_be_late() -> None:
    def few() -> Engine:
        return engine(seats=16)

    asks = poisson(1.5 * sustainable(long_answers, few), 60, long_answers, 9)
    run, patient = serve(Deadline, asks, few()), serve(Patient, asks, few())
    assert run.preemptions > 0
    assert run.attained(of_tenant("chat")) > 0.98
    assert patient.attained(of_tenant("chat")) < 0.9
    # They end, a few preempted several times, and not much later.
    assert all(one.finished is not None for one in run.outcomes if one.ask.tenant == "batch")
    assert run.seconds < patient.seconds * 1.1


def test_who_was_preempted_runs_for_a_while_before_that_happens_again() -> None:
    of = policy()
    urgent = work("urgent", 0.0, ttft=1.0)
    of.arrived(urgent, (), 0.0)
    new, often, timed = work("new"), work("often"), work("timed", ttft=1.0)
    new.since, often.since, timed.since = 0.0, 0.0, 0.0
    new.computed, often.computed, often.preemptions = 500, 100, 2
    running = [new, often, timed]
    assert of.victim(urgent, running, 0.1) is None, "half of its time is not over"
    assert of.victim(urgent, running, 0.9) is new
    assert of.victim(urgent, running, 2.1) is often, "less to compute again"
    assert of.victim(urgent, [timed], 0.9) is None
    assert of.victim(work("free"), running, 0.9) is None


def test_streams_ahead_yield_to_one_that_is_behind() -> None:
    """Thirty long contexts make a step 42 ms long; without them it is 6."""

    class Restless(Deadline):
        yields = False

    long = [Ask(0.0, 30_000, 1500, ttft=100.0, tpot=0.15, tenant="long") for _ in range(30)]
    short = [Ask(60 + n / 2, 200, 300, ttft=5.0, tpot=0.02, tenant="short") for n in range(20)]

    def large() -> Engine:
        return engine(blocks=80_000)

    run, restless = (serve(kind, [*long, *short], large()) for kind in (Deadline, Restless))
    assert restless.attained(of_tenant("short")) < 0.2
    assert run.attained(of_tenant("short")) == 1.0
    assert run.attained(of_tenant("long")) == 1.0


# Properties


@settings(deadline=None, max_examples=60)
@given(workloads)
def test_whatever_comes_it_ends_and_nothing_is_kept(asks: list[Ask]) -> None:
    """`conform` holds order, groups, `first` and `resting` to their contracts on the way."""
    for late in ("drop", "demote"):
        run = conform(Deadline, asks, late=late)
        for one in run.outcomes:
            timed = one.ask.ttft is not None or one.ask.due is not None
            assert one.error is None or (late == "drop" and timed and not one.starts)


def test_nothing_is_kept_of_what_has_ended() -> None:
    made = policy(engine(seats=8, blocks=1000))
    asks = poisson(60, 10, chat(0.8), 10) + poisson(5, 10, long_answers, 11)
    VirtualHost(made).run(asks)
    for held in (made._starts, made._waiting, made._unhurried, made._paced):
        assert not held
    assert not made._forecast._running
    assert not made._forecast._prefilling
    assert made._ahead == 0.0


class Inner(Stack):
    """Classes, and deadlines within."""

    def __init__(self, of: Engine, options: object) -> None:
        super().__init__([Classes(of, options), Deadline(of, options)])  # type: ignore[arg-type]


@settings(deadline=None, max_examples=30)
@given(workloads)
def test_within_classes_everything_ends_as_well(asks: list[Ask]) -> None:
    conform(Inner, asks)


def test_what_predictions_cannot_know_is_learnt_from_first_tokens_and_forgotten() -> None:
    of = engine()
    for number in range(100):
        of.times.observe(number + 1, 0, number + 1, 0.01)
    forecast = Forecast(of)
    now = 0.0

    def first_tokens(count: int, seconds: float) -> None:
        nonlocal now
        for number in range(count):
            one = work(f"{now}")
            forecast.started(one, now)
            now += seconds * (1 + number / count)
            one.first = now
            forecast.settle()
            forecast.stopped(one)

    first_tokens(RECENT, 0.02)
    waits = work("waits")
    assert forecast.first_token(waits, at_best=True) == pytest.approx(0.02, rel=0.05)
    assert forecast.first_token(waits, at_best=False) == pytest.approx(0.039, rel=0.05)
    first_tokens(RECENT, 0.002)
    assert forecast.first_token(waits, at_best=False) < 0.004


def test_a_machine_that_was_slow_is_tried_again() -> None:
    """Everything is given up, so nothing runs, so nothing shows that it is fast again."""
    before = [Ask(1.0 * n, 500, 10, ttft=0.15) for n in range(20)]
    slow = Ask(20.0, 500, 150)
    after = [Ask(45.0 + n, 500, 10, ttft=0.15) for n in range(40)]
    host = VirtualHost(make(Deadline), slowdown=lambda now: 20.0 if 20 <= now < 40 else 1.0)
    outcomes = host.run([*before, slow, *after]).outcomes
    assert all(one.met for one in outcomes[:20])
    assert 30 < (outcomes[20].finished or 0.0) < 40
    assert outcomes[21].error
    # The first that is tried is fast, those after it are believed to be, soon.
    assert sum(one.met for one in outcomes[21:]) > 20


def test_what_is_known_of_full_steps_alone_does_not_keep_them_full() -> None:
    """From the first moment every step is filled with prompts: what decoding alone takes is a
    guess, and if it is too high, paces look lost."""
    run = serve(Deadline, poisson(19.0, 20, documents, 3), engine(step_tokens=8192))
    served = [one for one in run.outcomes if one.finished is not None]
    assert sum(one.tpot > 0.03 for one in served) < 0.1 * len(served)
