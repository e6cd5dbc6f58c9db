"""The load generator against a server that answers well, badly or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from scalellm_plugins.benchmarks.load import Spec, drive, percentile
from scalellm_plugins.benchmarks.workloads import Template, Workload

Answer = Callable[[dict, asyncio.StreamWriter, int], Awaitable[None]]
TINY = Workload("tiny", "", prompt=20, output=4)
CHAT = Workload("talk", "", prompt=20, output=4, turns=3, system=5)


def sse(data: object) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    piece = f"data: {text}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def prompt_length(body: dict) -> int:
    return sum(len(message["content"].split()) for message in body["messages"])


async def good(body: dict, writer: asyncio.StreamWriter, _number: int) -> None:
    """Answer as vLLM would, streamed or not."""
    tokens = body["max_tokens"]
    usage = {"prompt_tokens": prompt_length(body), "completion_tokens": tokens}
    if not body["stream"]:
        message = {"role": "assistant", "content": " w" * tokens}
        text = json.dumps({"choices": [{"message": message}], "usage": usage}).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % len(text) + text)
        return
    start(writer)
    writer.write(sse({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
    for _ in range(tokens):
        writer.write(sse({"choices": [{"delta": {"content": " w"}}]}))
        await asyncio.sleep(0)
    writer.write(sse({"choices": [], "usage": usage}) + sse("[DONE]") + b"0\r\n\r\n")


def start(writer: asyncio.StreamWriter) -> None:
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )


@asynccontextmanager
async def serving(answer: Answer, seen: list[dict] | None = None) -> AsyncIterator[int]:
    """Serve `answer`, which gets the body, the writer and the request's number; yield the port."""
    number = 0

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal number
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                if seen is not None:
                    seen.append(body)
                number += 1
                await answer(body, writer, number)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    words = tmp_path / "words.json"
    words.write_text(json.dumps([f"word{i}" for i in range(100)]))
    return Spec(
        host="127.0.0.1",
        port=0,
        model="m",
        workload=TINY,
        template=Template(0),
        stream=True,
        streams=3,
        window_s=0.2,
        words=str(words),
        seed=1,
        warmup_s=0.0,
        timeout_s=20.0,
    )


def test_spec_survives_json(spec: Spec) -> None:
    assert Spec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("stream", [True, False])
async def test_good_answers(spec: Spec, stream: bool) -> None:
    async with serving(good) as port:
        result = await drive(replace(spec, port=port, stream=stream), announce=False)
    assert result["failed"] == 0
    assert result["wrong_prompts"] == 0
    assert result["prompt_tokens"] == 20
    assert result["requests"] > 3
    assert 0 < result["output_tokens"] <= 4 * result["requests"]
    assert result["client_cpu_s"] > 0
    assert (result["ttft_p50_ms"] is not None) == (result["itl_p50_ms"] is not None) == stream
    assert result["e2e_p50_ms"] <= result["e2e_p99_ms"]
    assert result["tokens_per_event"] == (1.0 if stream else None)


async def test_conversations_send_the_servers_answers_back(spec: Spec) -> None:
    seen: list[dict] = []
    async with serving(good, seen) as port:
        chat = replace(spec, port=port, workload=CHAT, streams=1)
        result = await drive(chat, announce=False)
    assert result["failed"] == 0
    longest = max((body["messages"] for body in seen), key=len)
    assert [m["role"] for m in longest] == ["system", "user", *["assistant", "user"] * 2]
    assert longest[2]["content"] == " w" * 4


async def failing(spec: Spec, bad: Answer, every: int = 2) -> dict:
    """Run against a server of whose answers every second one is bad."""

    async def answer(body: dict, writer: asyncio.StreamWriter, number: int) -> None:
        await (bad if number % every == 0 else good)(body, writer, number)

    async with serving(answer) as port:
        return await drive(replace(spec, port=port, window_s=0.5), announce=False)


async def test_status_500_is_a_failure(spec: Spec) -> None:
    async def bad(_body: dict, writer: asyncio.StreamWriter, _number: int) -> None:
        writer.write(b"HTTP/1.1 500 Oops\r\ncontent-length: 4\r\n\r\nboom")

    result = await failing(spec, bad)
    assert result["failed"] >= 1
    assert list(result["failures"]) == ["HTTP 500: boom"]
    assert result["requests"] >= 1


async def test_connection_reset_is_a_failure(spec: Spec) -> None:
    async def bad(_body: dict, writer: asyncio.StreamWriter, _number: int) -> None:
        start(writer)
        writer.write(sse({"choices": [{"delta": {"content": " w"}}]}))
        await writer.drain()
        writer.transport.abort()

    result = await failing(spec, bad)
    assert result["failed"] >= 1
    assert all(reason.startswith("connection lost") for reason in result["failures"])


async def test_truncated_stream_is_a_failure(spec: Spec) -> None:
    async def bad(body: dict, writer: asyncio.StreamWriter, _number: int) -> None:
        start(writer)
        writer.write(sse({"choices": [{"delta": {"content": " w"}}]}))
        usage = {"prompt_tokens": prompt_length(body), "completion_tokens": 1}
        writer.write(sse({"choices": [], "usage": usage}) + sse("[DONE]") + b"0\r\n\r\n")

    result = await failing(spec, bad)
    assert result["failed"] >= 1
    assert all("1 output tokens instead of" in reason for reason in result["failures"])


async def test_error_in_the_stream_is_a_failure(spec: Spec) -> None:
    async def bad(_body: dict, writer: asyncio.StreamWriter, _number: int) -> None:
        start(writer)
        writer.write(sse({"error": {"message": "engine died"}}) + sse("[DONE]") + b"0\r\n\r\n")

    result = await failing(spec, bad)
    assert result["failed"] >= 1
    assert all("engine died" in reason for reason in result["failures"])


async def test_not_http_is_a_failure(spec: Spec) -> None:
    async def bad(_body: dict, writer: asyncio.StreamWriter, _number: int) -> None:
        writer.write(b"hello\r\n\r\n")

    result = await failing(spec, bad)
    assert all("not an HTTP/1.1 answer" in reason for reason in result["failures"])
    assert result["failed"] >= 1


async def test_a_silent_server_is_a_failure(spec: Spec) -> None:
    async def bad(_body: dict, _writer: asyncio.StreamWriter, _number: int) -> None:
        await asyncio.sleep(60)

    async with serving(bad) as port:
        silent = replace(spec, port=port, timeout_s=0.1, streams=1)
        result = await drive(silent, announce=False)
    assert result["failures"] == {"no answer within 0.1 s": result["failed"]}
    assert result["output_tokens"] == 0
    assert result["requests"] == 0


async def test_nobody_listens(spec: Spec) -> None:
    async with serving(good) as port:
        pass
    result = await drive(replace(spec, port=port), announce=False)
    assert result["failed"] == 3 * 5
    assert all(reason.startswith("no connection") for reason in result["failures"])


async def test_prompts_of_another_length_are_told(spec: Spec) -> None:
    async with serving(good) as port:
        result = await drive(replace(spec, port=port, template=Template(5)), announce=False)
    assert result["wrong_prompts"] == result["requests"]


def test_percentiles() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile(list(range(101)), 0.99) == 99


async def test_the_load_stays_until_the_window_is_answered(spec: Spec) -> None:
    async def slow(body: dict, writer: asyncio.StreamWriter, number: int) -> None:
        # Longer than the window; streams take turns, so somebody is always in the middle.
        await asyncio.sleep(0.2 + 0.05 * (number % 3))
        await good(body, writer, number)

    async with serving(slow) as port:
        result = await drive(replace(spec, port=port, window_s=0.1), announce=False)
    assert result["failed"] == 0
    # The shortened ones, those in the window, and those that kept up the load.
    assert result["requests"] >= 3 * 2
    assert result["e2e_p50_ms"] is None or result["e2e_p50_ms"] >= 200
