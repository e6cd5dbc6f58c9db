"""Tokens that come as columns: the same bytes and counts as vLLM's outputs, and one write each."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scalellm_plugins.frontends.engine_rings import Columns

from .lane_parts import Bench, Peer, bench, output
from .lane_upstream import counters

pytestmark = pytest.mark.vllm

WORD, OTHER = 262, 300
TORN = 160
"""Ids below this are single bytes of the demo tokenizer, halves of characters among them."""


@pytest.fixture
def lane() -> Bench:
    """A lane without requests."""
    made = bench()
    made.fresh()
    return made


def by_columns(lane: Bench, peer: Peer, token: int, at: float, more: bool = False) -> None:
    """Deliver one token as `link.py` does with a step's columns."""
    step = Columns(at, [peer.answer], [token], [], 0, more)
    stats = lane.link.book.statistics()
    others, aborts = lane.lane.on_columns(step, stats)
    assert (others, aborts) == ([], [])
    lane.link.book.message(0, None, stats)
    if not more:
        lane.lane.flush()


def served(lane: Bench, columns: bool, steps: list[tuple[int, str]]) -> tuple[Any, ...]:
    """Serve one request; returns its text events, tokens, and vLLM's counters."""
    lane.fresh()
    peer = lane.take(stream=True, request_id="same", max_tokens=500)
    peer.answer.ask.created = 1
    answer = peer.answer
    lane.step([output(peer, [WORD], first=True)], 1.0)
    for number, (token, how) in enumerate(steps):
        at = 2.0 + number
        answer.paused = how == "paused"
        if how == "resumed":
            answer.flush()
        if columns:
            by_columns(lane, peer, token, at, how == "more")
        else:
            lane.step([output(peer, [token])], at)
    answer.paused = False
    lane.step([output(peer, [OTHER], "LENGTH")], 100.0)
    lane.link.book.flush()
    known = answer.stats
    text = b"".join(
        part.partition(b'"content":"')[2].partition(b'"},')[0]
        for part in peer.response()[2].split(b"data: ")
    )
    numbers = (known.num_generation_tokens, known.last_token_ts, answer.num_tokens)
    return text, numbers, counters(lane.client.logger_manager)


STEPS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, TORN), st.integers(0, 2047), st.sampled_from([WORD, 2047, 5000])),
        st.sampled_from(["", "", "", "more", "paused", "resumed"]),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_columns_say_what_outputs_say(lane: Bench, steps: list[tuple[int, str]]) -> None:
    assert served(lane, True, steps) == served(lane, False, steps)


def test_a_steady_token_is_one_write_before_the_turn_ends(lane: Bench) -> None:
    peer = lane.take(stream=True)
    lane.step([output(peer, [WORD], first=True)])
    by_columns(lane, peer, WORD, 2.0)  # the first goes the long way, and finds out
    written = len(peer.wire.writes)
    step = Columns(3.0, [peer.answer], [OTHER], [])
    lane.lane.on_columns(step, lane.link.book.statistics())
    assert len(peer.wire.writes) == written + 1
    assert not lane.lane._fresh


def test_a_worker_that_is_late_writes_once(lane: Bench) -> None:
    peer = lane.take(stream=True)
    lane.step([output(peer, [WORD], first=True)])
    by_columns(lane, peer, WORD, 2.0)
    written = len(peer.wire.writes)
    for at, more in ((3.0, True), (4.0, True), (5.0, False)):
        by_columns(lane, peer, OTHER, at, more)
    assert len(peer.wire.writes) == written + 1


def test_nothing_is_written_after_the_client_has_gone(lane: Bench) -> None:
    peer = lane.take(stream=True)
    lane.step([output(peer, [WORD], first=True)])
    by_columns(lane, peer, WORD, 2.0)
    written = len(peer.wire.writes)
    answer = peer.answer
    peer.cycle.disconnected = True
    answer.gone()
    lane.lane.on_columns(Columns(3.0, [answer], [OTHER], []), lane.link.book.statistics())
    lane.lane.flush()
    assert len(peer.wire.writes) == written
