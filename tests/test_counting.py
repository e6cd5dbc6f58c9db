"""Prompts and first tokens of vLLM's own lane, on stand-ins of its engine client."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from scalellm_plugins.frontends import counting
from scalellm_plugins.frontends.admission import SERVER, Admission
from scalellm_plugins.frontends.gate import GUARDED, Gate, Pass, Seat
from scalellm_plugins.frontends.limits import Limits, Refusal
from scalellm_plugins.frontends.tenants import Tenant, TenantFile

NOTHING = [0, 0, 0, 0]


class Processor:
    """As much of vLLM's output processor as is wrapped."""

    def __init__(self) -> None:
        self.added: list[Any] = []
        self.outputs: asyncio.Queue[Any] = asyncio.Queue()

    def add_request(self, request: Any, text: Any, *_more: Any) -> None:
        self.added.append(request)

    def process_outputs(self, outputs: list[Any], *_more: Any) -> None:
        for output in outputs:
            self.outputs.put_nowait(output)


class Engine:
    """As much of vLLM's engine client: a request per copy, outputs as they are processed."""

    def __init__(self) -> None:
        self.output_processor = Processor()
        self.aborted = 0

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> Any:
        processor = self.output_processor
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else [1] * len(prompt)
        for copy in range(sampling_params.n):
            request = SimpleNamespace(
                request_id=f"{copy}_{request_id}",
                sampling_params=sampling_params,
                prompt_token_ids=ids,
                prompt_embeds=None,
            )
            processor.add_request(request, None)
        try:
            while (output := await processor.outputs.get()).text:
                yield output.text
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise

    encode = generate

    def step(self, request_id: str, text: str) -> None:
        output = SimpleNamespace(request_id=request_id, text=text)
        self.output_processor.process_outputs([output], 1.0, None)


@pytest.fixture
def engine() -> Engine:
    made = Engine()
    counting.install(made)
    return made


@pytest.fixture
def gate() -> Gate:
    accounting: Any = None
    limits = Limits(max_prompt_tokens=100)
    return Gate(Admission.private(), TenantFile(None), limits, accounting, accounting)


def admitted(gate: Gate, name: str = "acme") -> Pass:
    """A pass in the context of this test, as in a task of the application."""
    seat = Seat(Tenant(name=name), gate.counters.index(name), (None,) * 4)
    assert gate.counters.enter(name, seat.entry) is None
    made = Pass(gate, seat, None)
    counting.current.set(made)
    return made


def params(**more: Any) -> Any:
    return SimpleNamespace(**{"n": 1, "extra_args": None, **more})


def tokens(count: int) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": [1] * count}


async def test_a_prompt_counts_from_its_call_to_its_end(engine: Engine, gate: Gate) -> None:
    ticket = admitted(gate)
    stream = engine.generate(tokens(30), params(), "a")
    used = gate.counters.used
    assert used(SERVER) == [1, 1, 30, 30], "before the first step: a stream's status is out by then"
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    engine.step("0_a", "x")
    assert await first == "x"
    assert used(SERVER) == [1, 0, 30, 0]
    engine.step("0_a", "")
    assert [text async for text in stream] == []
    assert used(SERVER) == [1, 0, 0, 0]
    ticket.leave()
    assert used(SERVER) == NOTHING


async def test_what_has_no_room_is_refused_before_the_engine_hears_of_it(
    engine: Engine, gate: Gate
) -> None:
    pytest.importorskip("vllm")
    admitted(gate, "other").count(60)
    ticket = admitted(gate)
    with pytest.raises(Exception, match="60 prompt tokens in flight, this request brings 90") as e:
        engine.generate(tokens(30), params(n=3), "a")
    assert e.value.http_status == 503  # type: ignore[attr-defined]
    assert isinstance(ticket.refusal, Refusal)
    assert engine.output_processor.added == []


async def test_a_client_that_goes_away_mid_way(engine: Engine, gate: Gate) -> None:
    ticket = admitted(gate)
    stream = engine.generate(tokens(30), params(n=2), "a")
    assert gate.counters.used(SERVER) == [1, 1, 60, 60]
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert engine.aborted == 1, "the engine's own generator is closed with ours"
    assert gate.counters.used(SERVER) == [1, 1, 0, 0]
    ticket.leave()
    engine.step("0_a", "late")  # an output that was on its way
    assert gate.counters.used(SERVER) == NOTHING


async def test_text_is_counted_when_the_engines_request_is_made(engine: Engine, gate: Gate) -> None:
    admitted(gate)
    stream: AsyncGenerator[Any, None] = engine.encode("seven!!", params(), "a")
    assert gate.counters.used(SERVER) == [1, 1, 0, 0]
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    assert gate.counters.used(SERVER) == [1, 1, 7, 7]
    engine.step("0_a", "x")
    await first
    await stream.aclose()
    assert gate.counters.used(SERVER) == [1, 0, 0, 0]


async def test_two_prompts_with_one_id_are_told_apart(engine: Engine, gate: Gate) -> None:
    """Clients choose request ids; the engine's own are different ones."""
    ticket = admitted(gate)
    streams = [engine.generate(tokens(10), params(), name) for name in ("a", "b")]
    tasks = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await asyncio.sleep(0)
    engine.step("0_b", "x")
    assert gate.counters.used(SERVER) == [1, 0, 20, 10]
    ticket.leave()
    assert gate.counters.used(SERVER) == [1, 0, 20, 10], "the engine works on it in the background"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for stream in streams:
        await stream.aclose()
    assert gate.counters.used(SERVER) == NOTHING


@pytest.mark.parametrize(
    ("prompt", "length"),
    [
        (tokens(3), 3),
        ({"type": "enc_dec", "encoder_prompt": tokens(9), "decoder_prompt": tokens(2)}, 2),
        ({"type": "embeds", "prompt_embeds": [[0.0]] * 4}, 4),
        ([1, 2], 2),
        (SimpleNamespace(prompt_token_ids=[1]), 1),
        ("text", None),
        ({"prompt": "text"}, None),
    ],
)
def test_lengths_of_prompts(prompt: Any, length: int | None) -> None:
    assert counting.prompt_tokens(prompt) == length


# Routes

UNGUARDED = {
    # They bring the engine no prompt.
    *("/v1/chat/completions/render", "/v1/chat/completions/derender", "/v1/responses/render"),
    *("/v1/completions/render", "/v1/completions/derender", "/cohere/v2/chat/render"),
    *("/v1/messages/render", "/v1/messages/count_tokens", "/v1/responses/{response_id}/cancel"),
    *("/tokenize", "/detokenize", "/ping", "/abort_requests", "/pause", "/resume"),
    *("/sleep", "/wake_up", "/collective_rpc", "/weight_checker", "/fault_tolerance/apply"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/start_profile", "/stop_profile"),
    *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/release_kv_cache_memory"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
    *("/start_draft_weight_update", "/update_weights", "/finish_weight_update"),
    *("/update_weight_version", "/scale_elastic_ep", "/is_scaling_elastic_ep"),
}


def _posts(folder: Path) -> set[str]:
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "post"
                and node.args
                and isinstance(node.args[0], ast.Constant)
                and str(node.args[0].value).startswith("/")
            ):
                found.add(node.args[0].value)
    return found


@pytest.mark.vllm
def test_every_post_of_vllm_is_guarded_or_known_to_need_no_guard() -> None:
    import importlib.util

    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    posts = _posts(Path(spec.origin).parent / "entrypoints")
    assert len(posts) > 30, "routes are no longer declared where this test looks"
    assert posts - GUARDED - UNGUARDED == set()
