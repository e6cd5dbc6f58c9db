"""The official clients against our server: what people's programs actually call."""

from __future__ import annotations

import asyncio
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

if TYPE_CHECKING:
    from .conftest import Server

pytestmark = [pytest.mark.vllm, pytest.mark.server]

QUESTION: list[Any] = [{"role": "user", "content": "What is 2 + 3?"}]
ANSWER = "2 + 3 = 5."
LANE = "frontend off" not in os.environ.get("SCALELLM_TEST_OPTIONS", "")
"""Whether there is a fast lane: not in all modes of `make test-modes`."""


@pytest.fixture
def client(demo_server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def fast(server: Server) -> float:
    """Requests that the fast lane has served so far."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        text = response.read().decode()
    found = re.findall(r'^scalellm:requests_total\{lane="fast".*\} (\S+)$', text, re.MULTILINE)
    return sum(map(float, found))


def test_openai_chat(client: Any, demo_server: Server) -> None:
    """What the client sends by itself (headers, nothing exotic) stays in the fast lane."""
    before = fast(demo_server)
    answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.id.startswith("chatcmpl-")
    assert fast(demo_server) == before + LANE


def test_openai_chat_streamed(client: Any, demo_server: Server) -> None:
    before = fast(demo_server)
    stream = client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1
    assert fast(demo_server) == before + LANE


def test_openai_completion(client: Any) -> None:
    asked: Any = {"model": "demo", "prompt": "The", "temperature": 0, "max_tokens": 8}
    asked["extra_body"] = {"ignore_eos": True}
    whole = client.completions.create(**asked)
    stream = client.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"


def test_openai_raw_response(client: Any) -> None:
    """Headers that programs look at are there, and ours says where the time went."""
    raw = client.chat.completions.with_raw_response.create(
        model="demo", messages=QUESTION, temperature=0, extra_headers={"X-Request-Id": "abc-1"}
    )
    assert raw.status_code == 200
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().id == "chatcmpl-abc-1"
    if not LANE:
        return
    stages = re.findall(r"(\w+);dur=[\d.]+", raw.headers["server-timing"])
    assert stages == [
        *("tokenize", "to_engine", "engine_queue", "prefill", "decode", "write"),
        "total",
    ]


def test_openai_errors_are_typed(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="demo", messages=QUESTION, temperature=-1)


def test_openai_async_many(demo_server: Server) -> None:
    """Many at once on one client: answers are not mixed up."""

    async def ask(made: Any, left: int, right: int) -> str:
        stream = await made.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": f"What is {left} + {right}?"}],
            temperature=0,
            stream=True,
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    async def run() -> list[str]:
        base = f"{demo_server.url}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as made:
            return await asyncio.gather(*[ask(made, n, 2) for n in range(1, 9)])

    answers = asyncio.run(run())
    assert [answer.startswith(f"{n} + 2 = ") for n, answer in enumerate(answers, 1)] == [True] * 8


def test_openai_responses(client: Any) -> None:
    made = client.responses.create(model="demo", input="What is 2 + 3?", temperature=0)
    assert made.output_text == ANSWER
    streamed = [
        event.delta
        for event in client.responses.create(
            model="demo", input="What is 2 + 3?", temperature=0, stream=True
        )
        if event.type == "response.output_text.delta"
    ]
    assert "".join(streamed) == ANSWER


def test_openai_stream_closed_early_leaves_nothing(client: Any, demo_server: Server) -> None:
    """A client that goes away in the middle: its request leaves the engine."""
    stream = client.completions.create(
        model="demo",
        prompt="The",
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True, "min_tokens": 1500},
    )
    next(iter(stream))
    stream.close()
    running = "?"
    for _ in range(100):
        with urllib.request.urlopen(f"{demo_server.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        found = re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.MULTILINE)
        running = found[1] if found else "?"
        if float(running) == 0:
            break
        time.sleep(0.1)  # polling another process: there is nothing to wait on
    assert float(running) == 0


def test_anthropic_messages(demo_server: Server) -> None:
    with anthropic.Anthropic(base_url=demo_server.url, api_key="none", max_retries=0) as made:
        message = made.messages.create(
            model="demo", max_tokens=64, messages=QUESTION, extra_body={"temperature": 0}
        )
        assert message.content[0].text == ANSWER
        with made.messages.stream(
            model="demo", max_tokens=64, messages=QUESTION, extra_body={"temperature": 0}
        ) as stream:
            assert "".join(stream.text_stream) == ANSWER
