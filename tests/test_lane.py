"""The lane's step pass against vLLM's own: what clients read, and what metrics say."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

import prometheus_client

from scalellm_plugins.frontends import lane as lane_module
from scalellm_plugins.frontends import segments

from .lane_parts import CHAT, COMPLETION, Bench, Peer, bench, dropped, events, output, text_of
from .lane_upstream import Run, Upstream, counters

pytestmark = pytest.mark.vllm


# Random requests over random steps, through the engine's holding, the codec and the lane

WORDS = (262, 300, 77, 500, 901, 1200)
TORN = (0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80)
"""Among the first ids of a byte-level tokenizer: single bytes of unfinished characters."""
SPECIAL = (0, 1, 2, 2047)
TOKENS = st.one_of(st.sampled_from(WORDS), st.sampled_from(TORN), st.sampled_from(SPECIAL))


@dataclass
class Plan:
    """One request and what the engine generates for it: tokens by step, and how it ends."""

    path: str
    body: dict[str, Any]
    steps: list[list[int]]
    reason: str
    stop_reason: int | None
    start: int
    preempted: bool


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    body: dict[str, Any] = {"max_tokens": 60, "stream": draw(st.booleans())}
    if body["stream"]:
        usage, continuous = draw(st.booleans()), draw(st.booleans())
        body["stream_options"] = {"include_usage": usage, "continuous_usage_stats": continuous}
    if draw(st.booleans()):
        body["stream_interval"] = draw(st.integers(1, 4))
    if draw(st.booleans()):
        decode = bench().tokenizer.decode
        texts = [decode([draw(st.sampled_from(WORDS)), draw(st.sampled_from(WORDS))])[1:4]]
        texts.append("never there")
        body["stop"] = draw(st.sampled_from([texts, texts[0] or "x"]))
        body["include_stop_str_in_output"] = draw(st.booleans())
        body["min_tokens"] = draw(st.integers(0, 4))
    body["skip_special_tokens"] = draw(st.booleans())
    reason = draw(st.sampled_from(["STOP", "STOP", "LENGTH", "ABORT", "ERROR", "REPETITION"]))
    return Plan(
        path=draw(st.sampled_from([CHAT, COMPLETION])),
        body=body,
        steps=draw(st.lists(st.lists(TOKENS, min_size=1, max_size=3), min_size=1, max_size=9)),
        reason=reason,
        stop_reason=draw(st.sampled_from([None, 2])) if reason == "STOP" else None,
        start=draw(st.integers(0, 3)),
        preempted=draw(st.booleans()),
    )


def _outputs(run: Run, plan: Plan, request_id: str, number: int) -> Any:
    from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType

    last = number == len(plan.steps) - 1
    made = output(
        request_id,
        plan.steps[number],
        plan.reason if last else None,
        first=number == 0,
        stop_reason=plan.stop_reason if last else None,
    )
    if plan.preempted and number == 2:
        made.events = [EngineCoreEvent(EngineCoreEventType.PREEMPTED, 1.0)]
    return made


def _play(run: Run, script: list[Plan], pauses: list[float]) -> None:
    """Start and step every request; one that was aborted gives one more output, then none."""
    from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats

    places: dict[int, int] = {}
    ids: dict[int, str] = {}
    timestamp, tick, aborted = 1.0, 0, set[str]()
    while len(places) < len(script) or any(
        place < len(script[index].steps) for index, place in places.items()
    ):
        for index, plan in enumerate(script):
            if plan.start == tick:
                ids[index] = run.add(plan.path, **plan.body)
                places[index] = 0
        outputs = []
        for index, place in places.items():
            plan = script[index]
            if place < len(plan.steps):
                outputs.append(_outputs(run, plan, ids[index], place))
                places[index] += 1 if ids[index] not in aborted else len(plan.steps)
        aborted = set(run.upstream.aborts)
        stats = SchedulerStats(num_running_reqs=len(outputs))
        stats.prefix_cache_stats = PrefixCacheStats(queries=tick % 3, requests=tick % 3)
        if outputs:
            run.step(outputs, timestamp, stats)
            timestamp += pauses[tick % len(pauses)]
        tick += 1


def _compare(peer: Peer, task: Any) -> None:
    if isinstance(task.exception(), Exception):
        # vLLM's application answers so outside of the generator.
        assert type(task.exception()).__name__ == "GenerationError"
        status, _, body = peer.response()
        assert (status, json.loads(body)["error"]["code"]) == (500, 500)
        return
    status, _, body = peer.response()
    assert status == 200
    if not peer.body["stream"]:
        ours, theirs = json.loads(body), json.loads(task.result())
        ours["created"] = theirs["created"]
        assert json.dumps(ours) == json.dumps(theirs)
        return
    ours, theirs = events(body), events(task.result())
    if peer.body.get("stream_interval", 1) == 1:
        assert dropped(ours) == dropped(theirs)
        return
    # Boundaries may differ: vLLM counts an event without text as one (we do not send it), and the
    # engine gives out what it keeps with a preemption.
    (text, *ours), (expected_text, *theirs) = _whole(ours), _whole(theirs)
    assert ours == theirs
    failed = any("error" in event for event in ours)  # then what was held back is lost
    assert text.startswith(expected_text) or expected_text.startswith(text)
    assert failed or text == expected_text


def _whole(stream: list[str]) -> list[Any]:
    """Return the text in one piece, then all else; counts of events with text are left out."""
    text, others = "", list[Any]()
    for event in stream:
        content = {"choices": []} if event == "[DONE]" else json.loads(event)
        if content.get("choices"):
            content.pop("usage", None)
        news = text_of(json.dumps(content)) is None
        for choice in content.get("choices", ()):
            delta = choice.get("delta", choice)
            for name in ("content", "text"):
                text += delta.pop(name, "")
        if news:
            others.append(content)
    return [text, *others]


@settings(max_examples=150)
@given(
    script=st.lists(plans(), min_size=1, max_size=4),
    pauses=st.lists(st.sampled_from([0.007, 0.0071, 0.6]), min_size=1, max_size=4),
)
def test_clients_and_metrics_get_what_vllm_gives_them(
    script: list[Plan], pauses: list[float]
) -> None:
    bench().fresh()
    run = Run(bench(), Upstream(bench()))
    _play(run, script, pauses)
    run.bench.turn()
    for peer, task in zip(run.peers, run.tasks, strict=True):
        _compare(peer, task)
    assert run.bench.idle()
    assert sorted(run.bench.core.aborts) == sorted(run.upstream.aborts)
    run.bench.link.book.flush()
    ours = counters(run.bench.client.logger_manager)
    theirs = counters(run.upstream.manager)
    different = {
        name: (ours.get(name), theirs.get(name))
        for name in ours | theirs
        if ours.get(name) != pytest.approx(theirs.get(name))
    }
    assert any("generation_tokens" in name and value for name, value in theirs.items())
    assert not different


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("created", [0, 5])
def test_details_of_the_prompts_tokens_are_vllms(
    path: str, stream: bool, created: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--enable-prompt-tokens-details: cached tokens, and those that were put into the cache."""
    lane = bench()
    lane.fresh()
    route = lane.routes[path]
    monkeypatch.setattr(route.handler, "enable_prompt_tokens_details", True)
    monkeypatch.setattr(route, "streams", dict(route.streams))
    monkeypatch.setattr(route, "full", route.full)
    lane.run(route.learn(lane.tokenizer))
    upstream = Upstream(lane)
    body = {"stream_options": {"include_usage": True}} if stream else {}
    peer = lane.take(path, stream=stream, **body)
    task = upstream.add(peer)
    first = output(peer, [WORDS[0]], "LENGTH", first=True)
    first.prefill_stats.num_cache_creation_tokens = created
    lane.step([first])
    upstream.processor.process_outputs([first], 1.0, None)
    lane.turn()
    got = peer.response()[2]
    if stream:
        assert events(got) == events(task.result())
    else:
        ours, theirs = json.loads(got), json.loads(task.result())
        ours["created"] = theirs["created"]
        assert ours == theirs


# Long prompts


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A lane without requests to which any prompt is a long one, and none is known."""
    made = bench()
    made.fresh()
    monkeypatch.setattr(lane_module, "INLINE_CHARS", -1)
    return made


def offered(lane: Bench, **body: Any) -> Peer:
    """Have the lane take a request whose prompt is to be tokenized."""
    peer = lane.peer(**body)
    assert lane.lane.take(peer.connection, peer.cycle)
    assert lane.core.requests == {}, "it was tokenized in the event loop"
    return peer


def tokenized(lane: Bench) -> None:
    """Wait for the thread, and for what comes of it."""
    lane.run(asyncio.wait(lane.lane._tasks))
    lane.turn()


def served() -> dict[str, float]:
    """Chat completions by lane, so far."""
    labels = ({"lane": lane, "route": CHAT} for lane in ("fast", "full"))
    return {
        each["lane"]: prometheus_client.REGISTRY.get_sample_value("scalellm:requests_total", each)
        or 0.0
        for each in labels
    }


@pytest.mark.parametrize("stream", [True, False])
def test_a_long_prompt_is_tokenized_in_a_thread(
    long: Bench, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, threads = served(), []
    encode = segments.Plan.encode

    def noted(self: segments.Plan) -> list[int]:
        threads.append(threading.current_thread())
        return encode(self)

    monkeypatch.setattr(segments.Plan, "encode", noted)
    peer = offered(long, stream=stream)
    tokenized(long)
    assert threads != [threading.current_thread()]
    monkeypatch.undo()  # short prompts are short again
    short = long.take(stream=stream)
    ours, theirs = long.core.requests.values()
    assert ours.prompt_token_ids == theirs.prompt_token_ids
    long.step([output(one, [WORDS[0]], "LENGTH", first=True) for one in (peer, short)])
    assert peer.response()[0] == 200
    assert long.idle()
    assert served() == {"fast": before["fast"] + 2, "full": before["full"]}


@pytest.mark.parametrize("why", ["too long", "refused", "failed"])
def test_a_long_prompt_that_the_lane_cannot_serve_is_passed_on_and_counted_there(
    long: Bench, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, body = served(), {}
    if why == "too long":  # which nobody knows before it is tokenized
        body = {"messages": [{"role": "user", "content": "no " * 3000}]}
    elif why == "refused":
        body = {"max_tokens": 0}

    def fails(_plan: segments.Plan) -> list[int]:
        raise RuntimeError("made to fail")

    if why == "failed":
        monkeypatch.setattr(segments.Plan, "encode", fails)
    peer = offered(long, **body)
    assert served() == before, "who serves it is not known yet"
    tokenized(long)
    assert peer.passed_on == [peer.cycle]
    assert served() == {"fast": before["fast"], "full": before["full"] + 1}
    assert long.core.requests == {}
    assert long.idle()


def test_a_client_that_leaves_while_its_prompt_is_tokenized_asks_for_nothing(long: Bench) -> None:
    peer = offered(long, stream=True)
    peer.cycle.disconnected = True
    peer.answer.gone()
    tokenized(long)
    assert (long.core.requests, long.core.aborts, peer.passed_on) == ({}, [], [])
    assert peer.wire.data == b""
    assert long.idle()


def test_a_long_prompt_that_has_no_room_is_not_passed_on(long: Bench) -> None:
    """The gate has answered already."""
    peer = long.peer()
    peer.connection.admitted = SimpleNamespace(bound=None, admit_prompt=lambda *_: False)
    assert long.lane.take(peer.connection, peer.cycle)
    tokenized(long)
    assert (long.core.requests, peer.passed_on) == ({}, [])
    assert long.idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_slow_client_that_catches_up_meanwhile_is_sent_nothing(long: Bench, stream: bool) -> None:
    """The answer before, on the same connection, is what it had to read."""
    peer = offered(long, stream=stream)
    peer.answer.flush()  # as the connection does when it may write again
    assert peer.wire.data == b""
    tokenized(long)
    peer.answer.flush()  # and once more, before its first token
    assert peer.wire.data == b""
    long.step([output(peer, [WORDS[0]], "LENGTH", first=True)])
    assert peer.response()[0] == 200


def test_a_request_that_cannot_be_begun_is_left_to_vllm_and_leaves_nothing(
    long: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be counted as unfinished for ever."""

    def fails(*_args: Any) -> None:
        raise RuntimeError("made to fail")

    monkeypatch.setattr(long.lane.detokenizer, "stream", fails)
    monkeypatch.setattr(lane_module, "INLINE_CHARS", 10**6)
    peer = long.peer(stream=True)
    assert not long.lane.take(peer.connection, peer.cycle)
    assert long.core.requests == {}
    assert long.idle()
