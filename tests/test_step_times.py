"""The learnt step times: held to the roofline, to outliers, and to a machine that changes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm_plugins.scheduling.step_times import ENOUGH, StepTimes
from scalellm_plugins.simulator.roofline import Roofline, gpu_preset, model_preset

Step = tuple[int, int, int, float]
"""Prompt tokens, decodes, context, s."""

CARDS = [("h200", "8b"), ("l4", "1b"), ("h100", "70b"), ("h200", "30b-a3b")]


def some_step(chance: random.Random, roofline: Roofline) -> Step:
    """Few or many decodes, with or without chunks of prompts, some of them continued."""
    decodes = chance.choice([0, chance.randint(1, 32), chance.randint(1, 256)])
    context = sum(chance.randint(50, 3000) for _ in range(decodes))
    prefill = pairs = rows = 0
    for _ in range(chance.randint(1, 3) if not decodes or chance.random() < 0.5 else 0):
        chunk, before = chance.randint(16, 2048), chance.choice([0, 0, chance.randint(0, 2048)])
        prefill += chunk
        context += before + chunk
        pairs += before * chunk + chunk * (chunk + 1) // 2
        rows += chance.random() < 0.7
    seconds = roofline.step_seconds(
        prefill, decodes, context, prefill_pairs=pairs, prefill_rows=rows
    )
    return prefill, decodes, context, seconds


def errors(times: StepTimes, steps: list[Step], slower: float = 1.0) -> list[float]:
    """Relative errors, smallest first."""
    return sorted(abs(times.predict(p, d, c) / (s * slower) - 1) for p, d, c, s in steps)


def learn(
    times: StepTimes,
    steps: list[Step],
    chance: random.Random,
    slower: Callable[[], float] = lambda: 1.0,
) -> None:
    for prefill, decodes, context, seconds in steps:
        measured = seconds * chance.lognormvariate(0, 0.03) * slower()
        times.observe(prefill, decodes, context, measured)


@pytest.mark.parametrize(("card", "model"), CARDS)
def test_three_hundred_steps_are_enough_to_predict_others(card: str, model: str) -> None:
    roofline = Roofline(gpu_preset(card), model_preset(model))
    chance = random.Random(1)
    times = StepTimes()
    learn(times, [some_step(chance, roofline) for _ in range(300)], chance)
    found = errors(times, [some_step(chance, roofline) for _ in range(400)])
    assert found[len(found) // 2] < 0.04
    assert found[len(found) * 9 // 10] < 0.12


@pytest.mark.parametrize(("card", "model"), CARDS[:2])
def test_a_machine_that_becomes_slower_is_followed(card: str, model: str) -> None:
    roofline = Roofline(gpu_preset(card), model_preset(model))
    chance = random.Random(2)
    times = StepTimes()
    learn(times, [some_step(chance, roofline) for _ in range(500)], chance)
    learn(times, [some_step(chance, roofline) for _ in range(100)], chance, lambda: 2.0)
    others = [some_step(chance, roofline) for _ in range(200)]
    assert errors(times, others, slower=2.0)[100] < 0.06
    learn(times, [some_step(chance, roofline) for _ in range(100)], chance)
    assert errors(times, others)[100] < 0.06


def test_steps_that_something_else_delayed_change_little() -> None:
    roofline = Roofline(gpu_preset("h200"), model_preset("8b"))
    chance = random.Random(3)
    times = StepTimes()
    steps = [some_step(chance, roofline) for _ in range(500)]
    learn(times, steps, chance, lambda: 20.0 if chance.random() < 0.04 else 1.0)
    assert errors(times, steps)[250] < 0.05
    before = times.predict(0, 64, 64 * 300)
    times.observe(0, 64, 64 * 300, 5.0)
    assert times.predict(0, 64, 64 * 300) == pytest.approx(before, rel=0.05)


def test_nothing_is_predicted_of_nothing() -> None:
    times = StepTimes()
    assert times.predict(512, 64, 20_000) == 0.0
    for _ in range(ENOUGH - 1):
        times.observe(0, 1, 100, 0.005)
    assert times.predict(0, 1, 100) == 0.0
    times.observe(0, 1, 100, 0.005)
    assert times.predict(0, 1, 100) == pytest.approx(0.005, rel=0.01)
    assert times.predict(0, 0, 0) == 0.0


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_times_that_make_no_sense_are_not_learnt(seconds: float) -> None:
    times = StepTimes()
    times.observe(0, 1, 100, seconds)
    times.observe(0, 0, 0, 0.1)
    assert times.seen == 0


def test_what_a_prompt_costs_is_remembered_while_there_is_none() -> None:
    """Solving the normal equations would give it to whoever is left, or to nobody."""
    roofline = Roofline(gpu_preset("h200"), model_preset("8b"))
    chance = random.Random(4)
    times = StepTimes()
    learn(times, [some_step(chance, roofline) for _ in range(300)], chance)
    before = times.predict(2048, 64, 64 * 500)
    for number in range(5000):
        context = 64 * (500 + number % 50)
        times.observe(0, 64, context, roofline.step_seconds(0, 64, context))
    assert times.predict(2048, 64, 64 * 500) == pytest.approx(before, rel=0.2)


def test_steps_that_are_all_full_are_not_taken_for_what_any_step_takes() -> None:
    """Else nobody would try shorter ones: all of the time would be a constant's."""
    roofline = Roofline(gpu_preset("h200"), model_preset("8b"))
    times = StepTimes()
    for number in range(1, 40):
        context = 8192 + number * 2000
        seconds = roofline.step_seconds(8192 - number, number, context)
        times.observe(8192 - number, number, context, seconds)
    assert times.predict(0, 40, 80_000) < 0.3 * times.predict(8152, 40, 88_192)


def test_a_step_longer_than_any_before_goes_on_as_steep() -> None:
    times = StepTimes()
    for number in range(200):
        tokens = 100 + number * 2
        times.observe(tokens, 0, tokens, 0.001 + tokens * 20e-6)
    assert times.predict(4000, 0, 4000) == pytest.approx(0.081, rel=0.2)


def test_steps_that_are_always_the_same_predict_themselves() -> None:
    """All features are collinear then."""
    times = StepTimes()
    for _ in range(200):
        times.observe(0, 32, 32 * 400, 0.006)
    assert times.predict(0, 32, 32 * 400) == pytest.approx(0.006, rel=0.01)
    assert times.predict(0, 16, 16 * 400) > 0


steps = st.tuples(
    st.integers(0, 8192),
    st.integers(0, 512),
    st.integers(0, 10**6),
    st.floats(1e-6, 100, allow_nan=False),
)


@settings(deadline=None)
@given(st.lists(steps, min_size=ENOUGH, max_size=60), steps, st.integers(0, 1000))
def test_more_work_is_never_predicted_to_take_less_time(
    learnt: list[Step], step: Step, more: int
) -> None:
    """Whatever was measured: budgets are found by bisection."""
    times = StepTimes()
    for one in learnt:
        times.observe(*one)
    prefill, decodes, context, _ = step
    base = times.predict(prefill, decodes, context)
    assert 0 <= base < math.inf
    assert times.predict(prefill + more, decodes, context) >= base * (1 - 1e-9)
    assert times.predict(prefill, decodes + more, context) >= base * (1 - 1e-9)
    assert times.predict(prefill, decodes, context + more) >= base * (1 - 1e-9)


def test_a_long_life_does_not_overflow() -> None:
    times = StepTimes()
    for _ in range(60_000):
        times.observe(0, 4, 1000, 0.004)
    assert times.predict(0, 4, 1000) == pytest.approx(0.004, rel=0.01)
