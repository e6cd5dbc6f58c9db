"""The engine's refusals in vLLM's own code: exceptions of its kind, and streams that wait."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("uvicorn")

import prometheus_client
from vllm.exceptions import GenerationError, GracefulHTTPError

from scalellm_plugins.frontends import engine_refusals
from scalellm_plugins.frontends.engine_refusals import Held, exception, until_refused
from scalellm_plugins.frontends.limits import error_body
from scalellm_plugins.scheduling.refused import Refused

from .lane_parts import CHAT, bench

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

LATE = Refused(504, "The deadline has passed.")
FULL = Refused(429, "The quota is used up.", retry_after_s=7)


# The exception


@pytest.mark.parametrize("refused", [LATE, FULL])
def test_vllm_answers_with_the_status_and_no_trace_in_its_log(refused: Refused) -> None:
    """It logs any exception but its own `GenerationError` in the middle of a stream."""
    error = exception(refused)
    assert isinstance(error, GenerationError)
    assert isinstance(error, GracefulHTTPError)
    handler = bench().routes[CHAT].handler
    document = handler.create_error_response(error).model_dump()
    assert document == json.loads(error_body(refused.status, refused.message))


def test_refusals_are_counted() -> None:
    def value() -> float:
        name, labels = "scalellm:engine_refusals_total", {"status": "429"}
        return prometheus_client.REGISTRY.get_sample_value(name, labels) or 0.0

    before = value()
    exception(FULL)
    exception(LATE)
    assert value() == before + 1


def test_an_event_has_the_type_of_the_status_and_others_stay_vllms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handler = bench().routes[CHAT].handler
    name = "_convert_generation_error_to_streaming_response"
    original = getattr(handler, name)
    monkeypatch.setattr(handler, name, original)  # put back after the test
    state = SimpleNamespace(_state={"openai_serving_chat": handler, "args": object()})
    engine_refusals.tell_in_streams(state)
    told = json.loads(getattr(handler, name)(exception(FULL)))["error"]
    assert told == json.loads(error_body(429, FULL.message))["error"]
    other = GenerationError("broken")
    assert getattr(handler, name)(other) == original(other)


# What the engine client generates


class Outputs:
    """An engine client's generator, and whether it was closed."""

    def __init__(self, *outputs: list[tuple[str | None, Any]]) -> None:
        self.closed = False
        self._outputs = outputs

    async def all(self) -> Any:
        try:
            for output in self._outputs:
                yield SimpleNamespace(
                    outputs=[
                        SimpleNamespace(finish_reason=reason, stop_reason=stop)
                        for reason, stop in output
                    ]
                )
        finally:
            self.closed = True


async def test_a_refusal_ends_what_is_generated() -> None:
    """Also one of several answers: the engine client then aborts the others."""
    held = Held(None, anthropic=False)
    outputs = Outputs([(None, None)], [("stop", "x"), ("error", LATE.reason())], [(None, None)])
    generated = until_refused(outputs.all(), held)
    await anext(generated)
    assert held.refused is None
    with pytest.raises(GracefulHTTPError, match=LATE.message) as error:
        await anext(generated)
    assert (outputs.closed, held.refused) == (True, LATE)
    assert error.value.http_status == 504


async def test_any_other_end_is_vllms() -> None:
    """A client may have a stop string that looks like a refusal."""
    ends = [("stop", LATE.reason()), ("error", None), ("error", "x"), ("abort", None)]
    outputs = Outputs(ends)  # type: ignore[arg-type]
    held = Held(None, anthropic=False)
    assert len([output async for output in until_refused(outputs.all(), held)]) == 1
    assert held.refused is None


async def test_who_stops_listening_closes_the_engines_generator() -> None:
    outputs = Outputs([(None, None)], [(None, None)])
    generated = until_refused(outputs.all(), None)
    await anext(generated)
    await generated.aclose()
    assert outputs.closed


# Streams that wait

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"x-request-id", b"7"),
        (b"transfer-encoding", b"chunked"),
    ],
}
WHOLE = {**START, "headers": [(b"content-type", b"application/json"), (b"content-length", b"2")]}


def part(body: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


class Wire:
    """uvicorn's `send`."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.came = asyncio.Event()

    async def __call__(self, message: Any) -> None:
        self.sent.append(message)
        self.came.set()


async def test_a_stream_begins_with_its_first_event() -> None:
    wire = Wire()
    held = Held(wire, anthropic=False)
    await held(START)
    assert wire.sent == []
    await held(part(b"a"))
    await held(part(b"", more=False))
    assert wire.sent == [START, part(b"a"), part(b"", more=False)]


async def test_an_answer_in_one_piece_does_not_wait() -> None:
    wire = Wire()
    held = Held(wire, anthropic=False)
    await held(WHOLE)
    assert wire.sent == [WHOLE]


@pytest.mark.parametrize("start", [START, WHOLE], ids=["stream", "whole"])
@pytest.mark.parametrize("anthropic", [False, True])
@pytest.mark.parametrize("refused", [LATE, FULL])
async def test_a_refusal_takes_the_place_of_the_answer(
    start: Any, anthropic: bool, refused: Refused
) -> None:
    wire = Wire()
    held = Held(wire, anthropic=anthropic)
    if start is START:
        await held(start)
    held.refused = refused
    if start is not START:
        await held(start)
    await held(part(b"data: {}\n\n"))
    await held(part(b"data: [DONE]\n\n", more=False))
    answer, body = wire.sent
    assert body["body"] == error_body(refused.status, refused.message, anthropic=anthropic)
    headers = dict(answer["headers"])
    assert answer["status"] == refused.status
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"content-length"] == b"%d" % len(body["body"])
    assert b"transfer-encoding" not in headers
    if start is START:
        assert headers[b"x-request-id"] == b"7"
    told = {b"x-should-retry": b"false"} if refused is LATE else {b"retry-after": b"7"}
    assert told.items() <= headers.items()


async def test_headers_go_ahead_when_the_first_event_takes_long() -> None:
    wire = Wire()
    held = Held(wire, anthropic=False)
    held.wait_s = 0.0
    await held(START)
    await asyncio.wait_for(wire.came.wait(), 30)
    assert wire.sent == [START]
    held.refused = LATE  # too late for a status: vLLM's event says it
    await held(part(b"a"))
    assert wire.sent == [START, part(b"a")]


async def test_the_first_event_waits_for_headers_that_are_on_their_way() -> None:
    """uvicorn lets them wait for a client that has not read the answer before."""
    gate = asyncio.Event()
    begun = asyncio.Event()
    sent: list[Any] = []

    async def slow(message: Any) -> None:
        if message is START:
            begun.set()
            await gate.wait()
        sent.append(message)

    held = Held(slow, anthropic=False)
    held.wait_s = 0.0
    await held(START)
    await asyncio.wait_for(begun.wait(), 30)
    event = asyncio.create_task(held(part(b"a")))
    await asyncio.sleep(0)
    assert sent == []
    gate.set()
    await event
    assert sent == [START, part(b"a")]


async def test_an_application_that_has_done_sends_nothing_more() -> None:
    """It failed between its headers and its first event: uvicorn answers."""
    wire = Wire()
    held = Held(wire, anthropic=False)
    held.wait_s = 0.0
    await held(START)
    held.close()
    for _ in range(8):
        await asyncio.sleep(0)
    assert wire.sent == []
