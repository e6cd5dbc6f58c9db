"""Limits on what is queued, over workers whose turns interleave in any way."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.frontends.shared_queue import CountedStates, QueueCounts, Turnstile


class Full(Exception):
    """The limit has no room."""


class Process:
    """One worker: vLLM's check, then what enters, in one turn of its loop."""

    def __init__(self, counts: QueueCounts, slot: int, requests: int, tokens: int) -> None:
        self.later: list[Callable[[], None]] = []
        self.counts, self.requests, self.tokens = counts, requests, tokens
        self.turnstile = Turnstile(counts, slot, tokens, Full, self.later.append)
        self.states = CountedStates(self.turnstile)

    def check(self, n: int, claim: bool = True) -> None:
        def vllms() -> None:
            if self.counts.requests() + n > self.requests or self.counts.tokens() >= self.tokens:
                raise Full

        self.turnstile.check(vllms, n if claim else 0)

    def end_turn(self) -> None:
        later, self.later[:] = list(self.later), []
        for call in later:
            call()


def state(tokens: int) -> Any:
    return SimpleNamespace(prompt_len=tokens, is_prefilling=True)


WHAT = st.sampled_from(["check", "enter", "turn", "first", "leave"])
STEP = st.tuples(st.integers(0, 2), WHAT, st.integers(1, 3))


@given(st.lists(STEP, max_size=60))
def test_the_limit_on_requests_is_never_exceeded(steps: list[Any]) -> None:
    counts = QueueCounts(3)
    processes = [Process(counts, slot, 5, 10**9) for slot in range(3)]
    room = [0, 0, 0]
    for number, (slot, what, n) in enumerate(steps):
        mine = processes[slot]
        if what == "check":
            try:
                mine.check(n)
                room[slot] = n
            except Full:
                taken = sum(len(p.states) for p in processes) + sum(room)
                assert taken + n > 5, "refused though there was room"
        elif what == "enter" and room[slot]:
            mine.states[str(number)] = state(7)
            room[slot] -= 1
        elif what == "turn":
            mine.end_turn()
            room[slot] = 0
        elif what == "first":
            for each in list(mine.states.values())[:n]:
                each.is_prefilling = False
            mine.turnstile.first_tokens()
        elif mine.states and what == "leave":
            mine.states.pop(next(iter(mine.states)))
        live = [each for p in processes for each in p.states.values()]
        assert len(live) <= 5
        assert counts.requests() == len(live) + sum(room)
        assert counts.tokens() == sum(7 for each in live if each.is_prefilling)


def test_tokens_that_came_in_between_are_seen() -> None:
    """Both look and there is room; one prompt fills it before the other one is counted."""
    counts = QueueCounts(2)
    one, other = (Process(counts, slot, 99, 100) for slot in range(2))
    one.check(1)
    other.check(1)
    one.states["a"] = state(100)
    with pytest.raises(Full):
        other.states["b"] = state(1)
    assert "b" not in other.states
    assert (counts.requests(), counts.tokens()) == (1, 100)
    one.states["a"].is_prefilling = False
    one.turnstile.first_tokens()
    one.end_turn()
    other.end_turn()
    other.check(1)
    other.states["b"] = state(1)
    assert (counts.requests(), counts.tokens()) == (2, 1)


def test_copies_of_one_prompt_are_let_in_together() -> None:
    counts = QueueCounts(1)
    process = Process(counts, 0, 99, 100)
    process.check(3)
    for name in "abc":
        process.states[name] = state(100)  # the first alone fills the limit
    assert counts.tokens() == 300
    with pytest.raises(Full):
        process.check(1)


def test_a_look_ahead_claims_nothing() -> None:
    counts = QueueCounts(2)
    one, other = (Process(counts, slot, 1, 100) for slot in range(2))
    one.check(1, claim=False)
    other.check(1)
    other.states["b"] = state(1)
    with pytest.raises(Full):
        one.check(1)


def test_what_a_dead_worker_had_is_forgotten() -> None:
    counts = QueueCounts(2)
    one, other = (Process(counts, slot, 2, 100) for slot in range(2))
    one.check(2)
    one.states["a"] = state(99)
    counts.clear(0)
    other.check(2)
    assert (counts.requests(), counts.tokens()) == (2, 0)
