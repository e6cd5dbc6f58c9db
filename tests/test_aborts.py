"""Requests that vLLM aborts on the frontend's side: what their clients get, and what is left."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine.exceptions import EngineDeadError

from scalellm_plugins.engine.holding import TAKE_KEPT
from scalellm_plugins.frontends import aborts

from .lane_parts import CHAT, COMPLETION, Bench, Peer, bench, events, output, text_of
from .lane_upstream import Run, Upstream

pytestmark = pytest.mark.vllm

WORDS = [262, 300, 77, 500, 901]


@pytest.fixture
def run() -> Run:
    """A lane and vLLM's own way, without requests."""
    made = bench()
    made.fresh()
    return Run(made, Upstream(made))


def steps(run: Run, *request_ids: str) -> None:
    """One step for each word, each request in all of them."""
    for number, word in enumerate(WORDS):
        outputs = [output(id_, [word], first=number == 0) for id_ in request_ids]
        run.step(outputs, 1.0 + number / 100)


def engine(run: Run, asked: list[list[str]]) -> None:
    """Let the engine's side answer, as patch_v1_engine_core_step.py does."""

    async def take(request_ids: list[str]) -> Any:
        asked.append(request_ids)
        await asyncio.sleep(0)
        return run.holder.take(request_ids)

    run.bench.core.methods[TAKE_KEPT] = take


def abort(run: Run, ids: list[str], *, internal: bool) -> None:
    """Abort on both sides."""
    run.bench.run(run.bench.client.abort(ids, internal=internal))
    run.upstream.processor.abort_requests(ids, internal=internal)
    run.bench.turn()


def whole(stream: bytes) -> tuple[str, list[str]]:
    """Return the text of a stream's events in one piece, and its other news."""
    text, others = "", []
    for event in events(stream):
        piece = text_of(event)
        if piece is None and event != "[DONE]" and (choices := json.loads(event)["choices"]):
            delta = choices[0].get("delta", choices[0])
            piece = delta.get("content", delta.get("text"))
            others.append(json.dumps([choices[0]["finish_reason"], delta.get("role")]))
        elif piece is None:
            others.append(event)
        text += piece or ""
    return text, others


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("body", [{}, {"stream": True, "stream_interval": 4}, {"stream": True}])
@pytest.mark.parametrize("internal", [True, False])
def test_an_aborted_answer_has_everything_that_was_generated(
    run: Run, path: str, body: dict[str, Any], internal: bool
) -> None:
    """As in vLLM, where every token has arrived: text, reason, and number of tokens."""
    asked: list[list[str]] = []
    engine(run, asked)
    if body:
        body = {**body, "stream_options": {"include_usage": True}}
    request_id = run.add(path, **body)
    peer, task = run.peers[0], run.tasks[0]
    steps(run, request_id)
    abort(run, [request_id if internal else peer.answer.external_req_id], internal=internal)
    status, _, got = peer.response()
    assert status == 200
    if body:
        assert whole(got) == whole(task.result())
        text = whole(got)[0]
    else:
        ours, theirs = json.loads(got), json.loads(task.result())
        ours["created"] = theirs["created"]
        assert ours == theirs
        text = got.decode()
    assert run.bench.tokenizer.decode(WORDS) in text
    assert asked == ([] if peer.hold is None else [[request_id]])
    assert run.bench.idle()
    assert run.bench.core.aborts == [request_id]


def test_only_what_may_be_kept_is_asked_for(run: Run) -> None:
    """Not for streams, requests without a token, those of vLLM's own lane, and unknown ones."""
    asked: list[list[str]] = []
    engine(run, asked)
    streamed, new, kept = run.add(CHAT, stream=True), run.add(CHAT), run.add(CHAT)
    steps(run, streamed, kept)
    abort(run, [streamed, new, "unknown"], internal=True)
    assert asked == []
    abort(run, [kept, "unknown"], internal=True)
    assert asked == [[kept]]
    assert run.bench.idle()


@pytest.mark.parametrize("error", [EngineDeadError(), None])
def test_an_engine_that_does_not_answer_ends_nothing_but_the_wait(
    run: Run, error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def take(_request_ids: list[str]) -> Any:
        if error is not None:
            raise error
        await asyncio.Event().wait()

    run.bench.core.methods[TAKE_KEPT] = take
    monkeypatch.setattr(aborts, "ANSWER_S", 0.01)
    request_id = run.add(CHAT)
    steps(run, request_id)
    abort(run, [request_id], internal=True)
    answer = json.loads(run.peers[0].response()[2])
    assert answer["choices"][0]["finish_reason"] == "abort"
    assert answer["usage"]["completion_tokens"] == 1, "what had arrived"
    assert run.bench.idle()


@pytest.mark.parametrize("ends", [True, False])
def test_an_answer_that_is_over_by_then_stays_as_it_is(run: Run, ends: bool) -> None:
    """Its end was on the way, or its client left, while the engine was asked."""
    lane: Bench = run.bench
    request_id = run.add(CHAT)
    peer: Peer = run.peers[0]
    steps(run, request_id)

    async def take(request_ids: list[str]) -> Any:
        if ends:
            (kept,) = run.holder.take(request_ids).values()
            lane.lane.on_outputs([output(request_id, [*kept, WORDS[0]], "LENGTH")], 2.0, None)
            return {}
        peer.cycle.disconnected = True
        answer, peer.connection.answer = peer.answer, None
        answer.gone()
        return run.holder.take(request_ids)

    lane.core.methods[TAKE_KEPT] = take
    lane.run(lane.client.abort(request_id, internal=True))
    lane.turn()
    if ends:
        choice = json.loads(peer.response()[2])["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == lane.tokenizer.decode([*WORDS, WORDS[0]])
    else:
        assert peer.wire.data == b""
    assert lane.idle()
