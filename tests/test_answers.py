"""How an answer ends, waits and fails: what its client reads, and what is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine.exceptions import EngineDeadError

from .lane_parts import (
    CHAT,
    COMPLETION,
    Bench,
    Peer,
    bench,
    dropped,
    events,
    output,
)
from .lane_upstream import Upstream, counters

pytestmark = pytest.mark.vllm

WORD, OTHER, THIRD = 262, 300, 500
BOTH = pytest.mark.parametrize("path", [CHAT, COMPLETION])
KINDS = pytest.mark.parametrize("stream", [True, False])


@pytest.fixture
def lane() -> Bench:
    """A lane without requests."""
    made = bench()
    made.fresh()
    return made


@pytest.fixture
def slowly(lane: Bench) -> Callable[[list[Any]], None]:
    """Deliver outputs without a turn of the event loop, so that nothing is written yet."""

    def deliver(outputs: list[Any]) -> None:
        lane.client.output_processor.process_outputs(outputs, 2.0, None)

    return deliver


def text(lane: Bench, *tokens: int) -> str:
    return str(lane.tokenizer.decode(list(tokens)))


def chat_texts(peer: Peer) -> list[str]:
    """Texts of a chat's events, without the first one (its role)."""
    found = []
    for event in events(peer.streamed()):
        if event != "[DONE]" and (choices := json.loads(event)["choices"]):
            delta = choices[0]["delta"]
            found += [] if "role" in delta else [delta["content"]]
    return found


def leave(peer: Peer) -> None:
    """The client goes away: what the connection does then."""
    peer.cycle.disconnected = True
    answer, peer.connection.answer = peer.answer, None
    answer.gone()


# Clients that go away


@KINDS
@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_a_client_that_goes_away_is_aborted_once(
    lane: Bench, stream: bool, linked: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not linked:
        monkeypatch.setattr(lane.lane, "link", None)
    peer = lane.take(stream=stream)
    request_id = peer.answer.request_id
    for number in range(tokens):
        lane.step([output(request_id, [WORD], first=number == 0)])
    written = len(peer.wire.writes)
    leave(peer)
    lane.turn()
    assert lane.core.aborts == [request_id]
    assert lane.idle()
    # What the engine had on its way is nobody's.
    lane.step([output(request_id, [OTHER], "LENGTH")])
    assert lane.core.aborts == [request_id]
    assert len(peer.wire.writes) == written


def test_a_client_that_goes_away_between_a_step_and_its_bytes_gets_none(
    lane: Bench, slowly: Callable[..., None]
) -> None:
    peer = lane.take(stream=True)
    lane.step([output(peer, [WORD], first=True)])
    written = len(peer.wire.writes)
    slowly([output(peer, [OTHER])])
    leave(peer)
    lane.turn()
    assert len(peer.wire.writes) == written
    assert len(lane.core.aborts) == 1


def test_a_client_that_leaves_before_reading_a_finished_answer_aborts_nothing(lane: Bench) -> None:
    peer = lane.take(stream=True)
    peer.answer.paused = True
    lane.step([output(peer, [WORD], "LENGTH", first=True)])
    assert lane.idle(), "the engine has ended it: nothing of it may be left"
    leave(peer)
    lane.turn()
    assert lane.core.aborts == []


def test_another_request_of_the_same_name_stays(lane: Bench) -> None:
    gone, stays = lane.take(stream=True, request_id="x"), lane.take(stream=True, request_id="x")
    left = stays.answer.request_id
    assert gone.answer.external_req_id == stays.answer.external_req_id
    leave(gone)
    processor = lane.client.output_processor
    assert processor.external_req_ids == {"chatcmpl-x": [left]}
    lane.step([output(left, [WORD], "LENGTH", first=True)])
    assert stays.response()[0] == 200
    assert lane.idle()


# vLLM ends requests


@BOTH
@KINDS
@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("usage", [False, True])
def test_a_request_that_vllm_aborts_ends_as_there(
    lane: Bench, path: str, stream: bool, tokens: int, usage: bool
) -> None:
    body: dict[str, Any] = {"stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": usage}
    upstream = Upstream(lane)
    peer = lane.take(path, **body)
    task = upstream.add(peer)
    external = peer.answer.external_req_id
    for number in range(tokens):
        one = [output(peer, [WORD], first=number == 0)]
        lane.step(one)
        upstream.processor.process_outputs(one, 1.0, None)
        lane.turn()
    aborted = lane.client.output_processor.abort_requests([external], internal=False)
    assert aborted == upstream.processor.abort_requests([external], internal=False)
    lane.turn()
    status, _, got = peer.response()
    assert status == 200
    if stream:
        assert dropped(events(got)) == dropped(events(task.result()))
    else:
        ours, theirs = json.loads(got), json.loads(task.result())
        ours["created"] = theirs["created"]
        assert ours == theirs
    assert lane.idle()


@KINDS
@pytest.mark.parametrize("tokens", [0, 2])
def test_a_lost_engine_is_told_to_every_client(lane: Bench, stream: bool, tokens: int) -> None:
    peers = [lane.take(stream=stream), lane.take(COMPLETION, stream=stream)]
    for number in range(tokens):
        lane.step([output(peer, [WORD], first=number == 0) for peer in peers])
    lane.client.output_processor.propagate_error(EngineDeadError())
    lane.turn()
    for peer in peers:
        status, _, body = peer.response()
        assert status == (200 if stream else 500)
        *before, error = events(body)[:-1] if stream else [body.decode()]
        assert json.loads(error)["error"]["code"] == 500
        # Without a token vLLM has not begun the stream; with some, the role comes before them.
        assert bool(before) == (stream and tokens > 0)
        if stream:
            assert events(body)[-1] == "[DONE]"


@KINDS
@pytest.mark.parametrize("linked", [True, False])
def test_a_request_that_the_engine_does_not_take_fails(
    lane: Bench, stream: bool, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With our link to the engine, and with vLLM's own client."""
    if not linked:
        monkeypatch.setattr(lane.lane, "link", None)
    lane.core.refuses = EngineDeadError()
    peer = lane.peer(stream=stream)
    assert lane.lane.take(peer.connection, peer.cycle)
    lane.turn()
    assert lane.idle()
    status, _, body = peer.response()
    error = events(body)[0] if stream else body
    assert (status, json.loads(error)["error"]["code"]) == (200 if stream else 500, 500)


def test_a_step_with_an_error_ends_only_its_request(lane: Bench) -> None:
    peers = [lane.take(stream=True, stream_options={"include_usage": True}) for _ in range(3)]
    lane.step([output(peer, [WORD], first=True) for peer in peers])
    good, bad, last = peers
    lane.step([output(good, [OTHER]), output(bad, [], "ERROR"), output(last, [OTHER])])
    assert [json.loads(event).get("error") is not None for event in events(bad.response()[2])[:-1]]
    lane.step([output(good, [WORD], "LENGTH"), output(last, [WORD], "LENGTH")])
    for peer in (good, last):
        peer.response()
        assert "".join(chat_texts(peer)) == text(lane, WORD, OTHER, WORD)
    assert lane.idle()


# Clients that are slow


@pytest.mark.parametrize("continuous", [False, True])
def test_tokens_of_a_slow_client_become_one_event(lane: Bench, continuous: bool) -> None:
    options = {"include_usage": continuous, "continuous_usage_stats": continuous}
    peer = lane.take(stream=True, stream_options=options)
    lane.step([output(peer, [WORD], first=True)])
    peer.answer.paused = True
    written = len(peer.wire.writes)
    for token in (OTHER, THIRD, WORD):
        lane.step([output(peer, [token])])
    assert len(peer.wire.writes) == written
    peer.answer.paused = False
    peer.answer.flush()
    assert len(peer.wire.writes) == written + 1
    assert chat_texts(peer)[1:] == [text(lane, OTHER, THIRD, WORD)]
    if continuous:
        last = json.loads(events(peer.streamed())[-1])
        assert last["usage"]["completion_tokens"] == 4
    lane.step([output(peer, [OTHER], "LENGTH")])
    peer.response()


def test_a_slow_client_gets_everything_of_an_answer_that_ended_meanwhile(lane: Bench) -> None:
    peer = lane.take(stream=True, stream_options={"include_usage": True})
    peer.answer.paused = True
    lane.step([output(peer, [WORD], first=True)])
    lane.step([output(peer, [OTHER], "LENGTH")])
    assert peer.wire.data == b""
    answer = peer.answer
    answer.paused = False
    answer.flush()
    *_, usage, done = events(peer.response()[2])
    assert "".join(chat_texts(peer)) == text(lane, WORD, OTHER)
    assert json.loads(usage)["usage"]["completion_tokens"] == 2
    assert done == "[DONE]"
    answer.flush()
    assert len(peer.finished) == 1


def test_a_slow_client_does_not_lose_count_of_its_interval(lane: Bench) -> None:
    """The engine sends four tokens at a time, and now and then what it has: never more are due."""
    peer = lane.take(stream=True, stream_interval=4)

    def step(count: int, **others: Any) -> int:
        lane.step([output(peer, [WORD] * count, **others)])
        return sum(len(lane.tokenizer.encode(one)) for one in chat_texts(peer))

    assert step(1, first=True) == 1
    assert step(3) == 1, "sent early"
    assert step(1) == 5
    peer.answer.paused = True
    assert step(4) == 5
    assert step(2) == 5, "sent early"
    peer.answer.paused = False
    peer.answer.flush()
    assert step(1) == 11, "two are missing to four"
    assert step(1) == 13
    assert step(3) == 13
    assert step(1) == 17


def test_steps_of_one_turn_become_one_event(lane: Bench, slowly: Callable[..., None]) -> None:
    peer = lane.take(stream=True)
    lane.step([output(peer, [WORD], first=True)])
    written = len(peer.wire.writes)
    slowly([output(peer, [OTHER])])
    slowly([output(peer, [THIRD, WORD])])
    lane.turn()
    assert len(peer.wire.writes) == written + 1
    assert chat_texts(peer)[1:] == [text(lane, OTHER, THIRD, WORD)]


# Headers


def test_headers_leave_with_the_first_token(lane: Bench) -> None:
    peer = lane.take(stream=True)
    assert peer.wire.writes == []
    lane.step([output(peer, [WORD], first=True)])
    assert len(peer.wire.writes) == 1
    lane.lane._send_headers()
    assert len(peer.wire.writes) == 1, "they were sent twice"


def test_headers_go_ahead_where_the_first_token_takes_long(lane: Bench) -> None:
    later = lane.timers.calls
    first, second, gone = (lane.take(stream=True) for _ in range(3))
    ((seconds, call),) = later
    assert seconds == pytest.approx(0.05)
    leave(gone)
    call()
    assert not gone.wire.writes
    for peer in (first, second):
        assert peer.wire.data.startswith(b"HTTP/1.1 200 OK\r\n")
        assert peer.wire.data.endswith(b"transfer-encoding: chunked\r\n\r\n")
    lane.step([output(peer, [WORD], "LENGTH", first=True) for peer in (first, second)])
    assert first.wire.data.count(b"HTTP/1.1") == 1
    assert first.response()[0] == second.response()[0] == 200
    third = lane.take(stream=True)
    assert len(later) == 2, "no timer for a request after the timer ran"
    leave(third)


# Our own mistakes


@KINDS
@pytest.mark.parametrize("ends", [True, False])
def test_a_failure_within_one_answer_hurts_no_other(
    lane: Bench, stream: bool, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, broken, last = peers = [lane.take(stream=stream) for _ in range(3)]
    answer, broken_id = broken.answer, broken.answer.request_id

    def fails(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("made to fail")

    lane.step([output(peer, [WORD], first=True) for peer in peers])
    monkeypatch.setattr(answer, "end" if ends else "advance", fails)
    lane.step([output(peer, [OTHER], "LENGTH") for peer in peers])
    status, _, body = broken.response()
    assert status == (200 if stream else 500)
    assert b"error" in body
    for peer in (first, last):
        assert peer.response()[0] == 200
        assert text(lane, WORD, OTHER).encode() in b"".join(
            [peer.response()[2], "".join(chat_texts(peer)).encode() if stream else b""]
        )
    assert lane.idle()
    assert set(lane.core.aborts) <= {broken_id}


def test_a_failure_while_an_answer_is_put_together_is_answered(
    lane: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of a request that has ended in the engine would wait for ever."""
    peer = lane.take(stream=False)

    def fails(*_args: Any, **_kwargs: Any) -> str:
        raise RuntimeError("made to fail")

    monkeypatch.setattr(lane.lane.detokenizer, "text", fails)
    lane.step([output(peer, [WORD], "LENGTH", first=True)])
    assert peer.response()[0] == 500
    assert lane.idle()


def test_a_failure_of_a_running_request_frees_it_in_the_engine(
    lane: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = lane.take(stream=True)
    request_id = peer.answer.request_id
    lane.step([output(peer, [WORD], first=True)])
    monkeypatch.setattr(peer.answer, "stream", None)
    lane.step([output(peer, [OTHER])])
    assert lane.core.aborts == [request_id]
    assert lane.idle()


# Beside vLLM's own requests


def test_vllms_own_requests_go_on_beside_the_lanes(lane: Bench) -> None:
    upstream = Upstream(lane)
    peer = lane.take(COMPLETION, stream=True, max_tokens=5)
    request = lane.core.requests[peer.answer.request_id]
    own = type(request)(
        **{name: getattr(request, name) for name in request.__struct_fields__}
        | {"request_id": "own-1", "external_req_id": "own"}
    )
    upstream.processor = lane.client.output_processor
    queue = upstream.queue(own)
    lane.step([output("own-1", [OTHER], first=True), output(peer, [WORD], first=True)])
    result = queue.get_nowait()
    assert [result.outputs[0].text, result.finished] == [text(lane, OTHER), False]
    lane.step([output("own-1", [WORD], "LENGTH"), output(peer, [OTHER], "LENGTH")])
    result = queue.get_nowait()
    assert [result.outputs[0].text, result.finished] == [text(lane, WORD), True]
    texts = [json.loads(one)["choices"][0]["text"] for one in events(peer.response()[2])[:-1]]
    assert "".join(texts) == text(lane, WORD, OTHER)
    assert lane.idle()
    lane.link.book.flush()
    counted = counters(lane.client.logger_manager)
    assert counted["counter_generation_tokens.0_total{}"] == 4
