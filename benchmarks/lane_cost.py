"""What the fast lane itself costs, part by part: no sockets, no engine, no second process.

    python -m scalellm_plugins.benchmarks.lane_cost [--requests N] [--tokens N] [--streams N]

The lane is the real one, over vLLM's real request classes, input processor, output processor and
metrics; the engine's client is a stand-in that drops requests, connections are stand-ins that drop
bytes, and the engine's outputs are made up, one step at a time. CPU time of this thread, so other
processes disturb little. What is missing: reading, decoding (0.25 µs per output) and sending.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DEMO = Path(__file__).parents[1] / "examples" / "demo_model"


class _Core:
    """The engine's client, without an engine."""

    engine_ranks_managed = (0,)
    resources = SimpleNamespace(engine_dead=False)

    async def add_request_async(self, request: Any) -> None:
        """Accept it."""

    async def abort_requests_async(self, ids: list[str]) -> None:
        """Accept it."""


class _Transport:
    """A connection that takes everything at once."""

    def __init__(self) -> None:
        self.writes = self.bytes = 0

    def write(self, data: bytes) -> None:
        """Count it."""
        self.writes += 1
        self.bytes += len(data)

    def is_closing(self) -> bool:
        """Never."""
        return False


def engine_client() -> Any:
    """Everything of vLLM's `AsyncLLM` that the lane uses, real but for the engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.renderers import renderer_from_config
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.loggers import StatLoggerManager

    args = AsyncEngineArgs(
        model=str(DEMO), served_model_name="demo", enforce_eager=True, max_model_len=2048
    )
    config = args.create_engine_config()
    renderer = renderer_from_config(config)
    client = SimpleNamespace(
        vllm_config=config,
        model_config=config.model_config,
        renderer=renderer,
        input_processor=InputProcessor(config, renderer),
        output_processor=OutputProcessor(renderer.tokenizer, log_stats=True),
        engine_core=_Core(),
        errored=False,
        _supported_tasks=("generate",),
        logger_manager=StatLoggerManager(config, engine_idxs=[0], client_count=1),
        check_admission=lambda *_args, **_kwargs: None,
        log_requests=False,
    )
    client.abort = functools.partial(AsyncLLM.abort, client)

    async def supported() -> Any:
        return client._supported_tasks

    client.get_supported_tasks = supported
    return client


async def build_lane(client: Any) -> Any:
    """Attach a lane as an API server does; returns it and its application's state."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from scalellm_plugins.frontends import attach

    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    models = OpenAIServingModels(client, [BaseModelPath(name="demo", model_path=str(DEMO))])
    renderer = OnlineRenderer(
        client.model_config,
        client.renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )
    common: dict[str, Any] = {"online_renderer": renderer, "request_logger": None}
    chat = OpenAIServingChat(
        client,
        models,
        "assistant",
        chat_template=None,
        chat_template_content_format="auto",
        **common,
    )
    state = SimpleNamespace(
        openai_serving_models=models,
        openai_serving_chat=chat,
        openai_serving_completion=OpenAIServingCompletion(client, models, **common),
        online_renderer=renderer,
        args=args,
    )
    app = SimpleNamespace(middleware_stack=None, user_middleware=[], state=state)
    await attach.attach(client, app, state, args)
    return state.scalellm_lane


def exchange(lane: Any, body: dict[str, Any]) -> tuple[Any, Any]:
    """A connection and a cycle with a complete request, as uvicorn would have made them."""
    cycle = SimpleNamespace(
        scope={
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "query_string": b"",
            "http_version": "1.1",
            "client": ("127.0.0.1", 1),
        },
        body=bytearray(json.dumps(body).encode()),
        waiting_for_100_continue=False,
        keep_alive=True,
        disconnected=False,
        access_log=False,
    )
    transport = _Transport()
    connection = SimpleNamespace(
        transport=transport,
        write=transport.write,
        server_state=SimpleNamespace(default_headers=[(b"server", b"uvicorn")]),
        answer=None,
        admitted=None,
        finish=lambda _cycle: None,
        lane=lane,
    )
    return connection, cycle


def _words(count: int, salt: int) -> str:
    return " ".join(("green", "river", "stone")[(i * salt) % 3] for i in range(count))


_OTHERS = bytearray(48 << 20)


def _evict() -> None:
    """Leave the caches as other processes would between two steps."""
    for start in range(0, len(_OTHERS), 1 << 20):
        _OTHERS[start : start + (1 << 20)] = bytes(1 << 20)


async def measure(
    lane: Any, stream: bool, streams: int, tokens: int, cold: bool = False
) -> dict[str, float]:
    """Serve `streams` requests of `tokens` tokens in step; returns µs of CPU by part."""
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.metrics.stats import IterationStats, PrefillStats

    manager = lane.engine_client.logger_manager
    exchanges = []
    for i in range(streams):
        messages = [{"role": "user", "content": f"{i} {_words(120, i + 1)}"}]
        body = {"model": "demo", "messages": messages, "max_tokens": tokens, "stream": stream}
        exchanges.append(exchange(lane, body))
    taking = 0.0
    for one in exchanges:
        if cold:
            _evict()
        clock = time.thread_time()
        assert lane.take(*one)
        taking += time.thread_time() - clock
    taken = time.thread_time()
    await asyncio.sleep(0)  # hands the requests to the engine
    sent = time.thread_time()
    ids = [connection.answer.request_id for connection, _ in exchanges]
    passing = recording = 0.0
    for step in range(tokens):
        last = step == tokens - 1
        outputs = [
            EngineCoreOutput(
                request_id,
                [500 + (step * 7 + number) % 900],
                finish_reason=FinishReason.LENGTH if last else None,
                prefill_stats=PrefillStats() if step == 0 else None,
                events=[] if step == 0 else None,
            )
            for number, request_id in enumerate(ids)
        ]
        if cold:
            _evict()
        clock = time.thread_time()
        stats = IterationStats()
        lane.engine_client.output_processor.process_outputs(outputs, 1.0 + step * 0.007, stats)
        lane.flush()
        passed = time.thread_time()
        manager.record(scheduler_stats=None, iteration_stats=stats)
        recorded = time.thread_time()
        passing += passed - clock
        recording += recorded - passed
    written = sum(connection.transport.writes for connection, _ in exchanges)
    return {
        "take, per request": taking / streams * 1e6,
        "send, per request": (sent - taken) / streams * 1e6,
        "pass and write, per token": passing / streams / tokens * 1e6,
        "metrics, per step": recording / tokens * 1e6,
        "writes per request": written / streams,
    }


async def _main(options: Namespace) -> int:
    lane = await build_lane(engine_client())
    for stream in (True, False):
        await measure(lane, stream, options.streams, 8)  # warm
        results = [
            await measure(lane, stream, options.streams, options.tokens, options.cold)
            for _ in range(options.rounds)
        ]
        print("streaming" if stream else "not streaming")
        for name in results[0]:
            print(f"  {name:28} {min(result[name] for result in results):8.2f}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m scalellm_plugins.benchmarks.lane_cost", description=__doc__
    )
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="other work between two steps")
    return asyncio.run(_main(parser.parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
