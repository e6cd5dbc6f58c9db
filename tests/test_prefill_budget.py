"""The prefill budget: monotone, never nothing, and steps as long as they should be."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.scheduling.budget import PrefillBudget
from scalellm_plugins.scheduling.policy import Engine, Policy

from .policy_asks import Ask, lengths, poisson
from .policy_parts import H200, Run, VirtualHost, engine, make, sustainable


def learnt(step_tokens: int = 8192, block_tokens: int = 16) -> Engine:
    """An engine that knows how long its steps take."""
    of = engine(step_tokens=step_tokens, block_tokens=block_tokens)
    chance = random.Random(1)
    for _ in range(400):
        prefill, decodes = chance.choice([0, chance.randint(1, 4096)]), chance.randint(1, 200)
        context = decodes * chance.randint(100, 2000)
        seconds = H200.step_seconds(prefill, decodes, context + prefill)
        of.times.observe(prefill, decodes, context + prefill, seconds)
    return of


LEARNT = learnt()
ODD = learnt(step_tokens=1000, block_tokens=48)
engines = st.sampled_from([LEARNT, ODD])
decodes = st.integers(1, 256)
contexts = st.integers(0, 500_000)
targets = st.floats(0.001, 0.5)


@given(engines, targets, decodes, contexts, st.integers(0, 200), st.integers(0, 300_000))
def test_more_to_decode_never_leaves_more_to_prompts(
    of: Engine, target: float, streams: int, context: int, more: int, longer: int
) -> None:
    base = PrefillBudget(target, of).tokens(streams, context, 0.0)
    assert PrefillBudget(target, of).tokens(streams + more, context, 0.0) <= base
    assert PrefillBudget(target, of).tokens(streams, context + longer, 0.0) <= base
    assert PrefillBudget(target * 1.5, of).tokens(streams, context, 0.0) >= base
    assert PrefillBudget(None, of).tokens(streams, context, 0.0, target) == base
    assert PrefillBudget(target, of).tokens(streams, context, 0.0, target / 2) <= base


@given(engines, targets, decodes, contexts, st.lists(st.floats(0, 2), max_size=50))
def test_prompts_always_advance_and_never_by_more_than_a_step(
    of: Engine, target: float, streams: int, context: int, gaps: list[float]
) -> None:
    """Whatever was measured."""
    budget = PrefillBudget(target, of)
    now = 0.0
    for gap in gaps:
        now += gap
        assert budget.floor <= budget.tokens(streams, context, now) <= of.step_tokens
    assert budget.floor >= of.block_tokens


@given(engines, targets, contexts)
def test_nothing_is_held_back_where_nothing_is_decoded(
    of: Engine, target: float, context: int
) -> None:
    assert PrefillBudget(target, of).tokens(0, context, 0.0) == of.step_tokens
    assert PrefillBudget(None, of).tokens(50, context, 0.0) == of.step_tokens


@given(targets, decodes, contexts)
def test_the_step_is_as_long_as_it_may_be(target: float, streams: int, context: int) -> None:
    budget = PrefillBudget(target, LEARNT)
    tokens = budget.tokens(streams, context, 0.0)
    block, times = LEARNT.block_tokens, LEARNT.times
    if tokens > budget.floor:
        assert times.predict(tokens, streams, context + tokens) <= target
    if tokens < LEARNT.step_tokens:
        more = tokens + block
        assert times.predict(more, streams, context + more) > target


def test_until_something_is_known_prompts_get_the_whole_step() -> None:
    assert PrefillBudget(0.01, engine()).tokens(32, 10_000, 0.0) == 2048


def test_what_the_step_times_do_not_know_of_is_made_up_for() -> None:
    """A host that needs 5 ms between steps: they are part of the pace, and of no step."""
    budget = PrefillBudget(0.03, LEARNT)
    now = 0.0
    found = []
    for _ in range(200):
        tokens = budget.tokens(32, 32 * 500, now)
        step = 0.005 + LEARNT.times.predict(tokens, 32, 32 * 500 + tokens)
        found.append(step)
        now += step
    assert found[0] > 0.034
    assert sum(found[-50:]) / 50 == pytest.approx(0.03, rel=0.03)
    # Without prompts to compute, steps are short: the whole target is aimed at again.
    for _ in range(200):
        now += 0.01
        tokens = budget.tokens(32, 32 * 500, now)
    assert LEARNT.times.predict(tokens, 32, 32 * 500 + tokens) == pytest.approx(0.03, rel=0.05)


def test_one_accident_does_not_stop_prompts() -> None:
    budget = PrefillBudget(0.03, LEARNT)
    before = budget.tokens(32, 16_000, 0.0)
    assert budget.tokens(32, 16_000, 5.0) > before * 0.8


def documents(chance: random.Random, at: float) -> Ask:
    """Long prompts, short answers."""
    return Ask(at, lengths(chance, 3000, 16_000), lengths(chance, 100, 512), tpot=0.03)


def served(target: float | None) -> Run:
    of = engine(step_tokens=8192)
    rate = sustainable(documents, lambda: engine(step_tokens=8192), count=200)
    budget = PrefillBudget(target, of)
    host = VirtualHost(make(Policy, of), budget=budget, noise=0.03)
    return host.run(poisson(rate * 0.8, 60, documents, seed=3))


@pytest.mark.parametrize("target", [0.015, 0.025])
def test_streams_keep_their_pace_and_prompts_hardly_wait_longer(target: float) -> None:
    fixed, adaptive = served(None), served(target)
    late = [one for one in adaptive.outcomes if one.work.made > 8 and one.tpot > target * 1.1]
    assert len(late) <= len(adaptive.outcomes) // 100
    assert sum(not one.met for one in fixed.outcomes) > len(fixed.outcomes) // 10

    def mean_ttft(run: Run) -> float:
        assert all(math.isfinite(one.ttft) for one in run.outcomes)
        return sum(one.ttft for one in run.outcomes) / len(run.outcomes)

    assert mean_ttft(adaptive) < mean_ttft(fixed) * 1.25
    assert adaptive.seconds < fixed.seconds * 1.05
