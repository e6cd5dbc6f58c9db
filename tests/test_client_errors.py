"""Requests that are to blame themselves get 400 where vLLM answers with 500 or not at all."""

from __future__ import annotations

import asyncio
import http.client
import json
from argparse import Namespace
from types import MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from openai.types.responses import ResponseErrorEvent
from pydantic import TypeAdapter
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.serial_utils import MsgpackEncoder

from scalellm_plugins.frontends import client_errors

from .lane_parts import bench

if TYPE_CHECKING:
    from .conftest import Server

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

HUGE = 2**70
"""More than the engine's messages have room for."""

# Reading


def application() -> TestClient:
    """An application with vLLM's handlers and ours, and faults of several origins."""
    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    init_exception_handler(app)

    @app.post("/read")
    def read(body: ChatCompletionRequest) -> None: ...

    @app.post("/own")
    def own() -> None:
        raise AttributeError("not the request's fault")

    def trip() -> None:
        raise KeyError("x")

    renderer: dict[str, Any] = {"__name__": "vllm.renderers.of_a_test", "trip": trip}
    exec("def render():\n    trip()\ndef index():\n    [][0]", renderer)
    app.post("/deeper")(lambda: renderer["render"]())
    app.post("/render")(lambda: renderer["index"]())
    client_errors.install_handlers(app)
    return TestClient(app, raise_server_exceptions=False)


def test_what_reading_a_request_trips_over_is_its_own_fault() -> None:
    client = application()
    body = {"messages": [{"role": "user", "content": "hi"}], "structured_outputs": 0}
    answer = client.post("/read", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "BadRequestError"
    assert "check_structured_outputs_count: 'int' object has no attribute" in error["message"]
    answer = client.post("/render")
    assert answer.status_code == 400
    assert "IndexError in index: list index" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/own", "/deeper"])
def test_any_other_fault_stays_the_servers(path: str) -> None:
    """Of a route itself, and of what a renderer calls (a tokenizer, a processor of images)."""
    answer = application().post(path)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "InternalServerError"


# Sending


def engine_client() -> Any:
    """vLLM's own client over an engine that only encodes what it is sent."""
    encoder = MsgpackEncoder()

    class Core:
        async def add_request_async(self, request: Any) -> None:
            encoder.encode(request)

        async def abort_requests_async(self, ids: list[str]) -> None:
            encoder.encode(ids)

    client = SimpleNamespace(**vars(bench().client))
    client.output_processor = OutputProcessor(bench().tokenizer, log_stats=False)
    client.engine_core = Core()
    client.log_requests = False
    client._run_output_handler = lambda: None
    for name in ("add_request", "_add_request", "abort"):
        setattr(client, name, MethodType(getattr(AsyncLLM, name), client))
    return client


def add(client: Any, request_id: str = "x", **parameters: Any) -> None:
    params = SamplingParams(output_kind=RequestOutputKind.DELTA, **parameters)
    asyncio.run(client.add_request(request_id, tokens_input([1, 2]), params))


def held(client: Any) -> list[Any]:
    processor = client.output_processor
    return [*processor.request_states, *processor.external_req_ids, *processor.parent_requests]


def test_vllm_still_needs_the_guard() -> None:
    """When this fails, what it is about can be removed."""
    client = engine_client()
    with pytest.raises(OverflowError):
        add(client, top_k=HUGE)
    assert held(client), "vLLM forgets what it has not sent"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("request_id", "parameters"),
    [
        ("x", {"top_k": HUGE}),
        ("x", {"stop": ["\ud800"]}),
        ("x", {"bad_words": ["\ud800"]}),
        ("\ud800", {}),
        ("x", {"extra_args": {"a": json.loads("[" * 70 + "]" * 70)}}),
    ],
    ids=["integer", "surrogate", "tokenizer", "id", "nested"],
)
def test_what_cannot_be_sent_is_refused_and_forgotten(
    n: int, request_id: str, parameters: dict[str, Any]
) -> None:
    client = engine_client()
    client_errors.guard_engine(client)
    with pytest.raises(VLLMValidationError, match="cannot be given to the engine"):
        add(client, request_id, n=n, **parameters)
    assert not held(client)


def test_good_requests_pass_the_guard() -> None:
    client = engine_client()
    client_errors.guard_engine(client)
    add(client, extra_args={"a": [{"b": [1, 2.5, None]}]})
    assert len(client.output_processor.request_states) == 1


def test_an_engine_that_is_lost_is_nobodys_fault() -> None:
    error = RuntimeError("lost")
    assert client_errors.unfit(error) is error
    assert isinstance(client_errors.unfit(OverflowError("x")), VLLMValidationError)


# Streams of the Responses API


def ended(error: Exception) -> list[Any]:
    """The events of a stream that fails after its first one."""

    async def create_responses() -> Any:
        async def events() -> Any:
            yield ChatCompletionRequest(messages=[])  # anything that can be encoded
            try:
                raise error
            except GenerationError as failed:  # as vLLM does
                text = serving._convert_generation_error_to_streaming_response(failed)
                TypeAdapter(ResponseErrorEvent).validate_json(text)

        return events()

    serving = SimpleNamespace(
        create_responses=create_responses,
        create_error_response=bench().routes["/v1/completions"].handler.create_error_response,
    )
    client_errors.guard_responses(serving)

    async def collect() -> list[Any]:
        return [event async for event in await serving.create_responses()]

    return asyncio.run(collect())


def test_a_failing_stream_ends_with_an_event() -> None:
    _, event = ended(VLLMValidationError("no such token", parameter="stop_token_ids"))
    assert (event.type, event.code, event.param) == ("error", "BadRequestError", "stop_token_ids")
    assert event.sequence_number == 1
    assert event.message.startswith("no such token")


def test_an_engines_error_is_not_called_the_clients() -> None:
    """vLLM trips over its own event for these; the error that it meant is told."""
    _, event = ended(GenerationError("the engine has failed"))
    assert (event.code, event.message) == ("InternalServerError", "the engine has failed")


# A real server

CHAT = '{"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, %s}'
RESPONSES = '{"model": "demo", "max_output_tokens": 2, %s}'
DEEP = "[" * 800 + "]" * 800
BAD = {
    "no object": ("/v1/chat/completions", CHAT % '"structured_outputs": "x"', "understood"),
    "another route": ("/invocations", CHAT % '"structured_outputs": "x"', "understood"),
    "no content": (
        "/v1/responses",
        RESPONSES % '"input": [{"type": "message", "id": "", "role": "assistant", '
        '"status": "completed", "content": []}]',
        "understood",
    ),
    "no reason": (
        "/v1/responses",
        RESPONSES % '"input": [{"type": "function_call_output", "call_id": null, "caller": null, '
        '"created_by": null, "id": "", "name": null, "namespace": null, "status": "completed", '
        '"output": [{"type": "input_text", "text": ""}]}]',
        "understood",
    ),
    "read by hand": ("/scale_elastic_ep", "[]", "understood"),
    "fast lane": ("/v1/chat/completions", CHAT % f'"top_k": {HUGE}', "given to the engine"),
    "full lane": ("/v1/chat/completions", CHAT % f'"n": 2, "top_k": {HUGE}', "given to the engine"),
    "surrogate": ("/v1/chat/completions", CHAT % '"stop": "\\ud800"', "given to the engine"),
    "anthropic": ("/v1/messages", CHAT % '"stop_sequences": ["\\ud800"]', "given to the engine"),
    # vLLM's engine, and with it the server, ends with this one.
    "nested": (
        "/v1/chat/completions",
        CHAT % f'"kv_transfer_params": {{"a": {DEEP}}}',
        "64 levels",
    ),
}


@pytest.mark.server
@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_told_so(demo_server: Server, name: str) -> None:
    """And its connection serves the next request, as after any other 400."""
    path, body, words = BAD[name]
    connection = http.client.HTTPConnection(urlsplit(demo_server.url).netloc, timeout=120)
    connection.request("POST", path, body, {"content-type": "application/json"})
    with connection.getresponse() as answer:
        text = answer.read().decode()
        assert answer.status == 400, text
        assert not answer.will_close
    assert words in json.loads(text)["error"]["message"]
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.server
@pytest.mark.parametrize("bad", ['"stop_token_ids": [99999999]', '"metadata": {"a": "\\ud800"}'])
def test_a_stream_of_responses_is_not_cut(demo_server: Server, bad: str) -> None:
    body = json.loads(RESPONSES % f'"input": "hi", "stream": true, {bad}')
    with demo_server.open("/v1/responses", body) as response:
        last = response.read().decode().rstrip("\n").rpartition("\n\n")[2]
    kind, data = last.split("\n")
    assert kind == "event: error"
    assert json.loads(data.removeprefix("data: "))["code"] == "BadRequestError"


@pytest.mark.server
def test_a_stream_of_the_fast_lane_says_it_in_an_event(demo_server: Server) -> None:
    body = json.loads(CHAT % f'"stream": true, "top_k": {HUGE}')
    with demo_server.open("/v1/chat/completions", body) as response:
        first = response.readline().decode()
    error = json.loads(first.removeprefix("data: "))["error"]
    assert error["code"] == 400
    assert "given to the engine" in error["message"]
