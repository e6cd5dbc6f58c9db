"""Policies on a real server, seen through the openai client: real vLLM, the demo model, the CPU."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

openai = pytest.importorskip("openai")

from .conftest import DEMO_MODEL, _start  # noqa: E402

if TYPE_CHECKING:
    from .conftest import Server

pytestmark = [pytest.mark.vllm, pytest.mark.server]

SEATS, LONG = 2, 1500
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Seats for two; classes first, within them deadlines; a tenant that has few tokens."""
    folder = tmp_path_factory.mktemp("policies")
    tenants = folder / "tenants.json"
    free, metered = (
        {"name": name, "keys": [hashlib.sha256(f"{name}-key".encode()).hexdigest()]}
        for name in ("free", "metered")
    )
    tenants.write_text(json.dumps([free, metered | {"tokens_per_minute": 60}]))
    options = (
        *("--plugins", "scalellm", "--scalellm.strict", "--enforce-eager"),
        *("--served-model-name", "demo", "--max-model-len", "2048"),
        *("--max-num-seqs", str(SEATS), "--scalellm.scheduler.policy", "priority,deadline"),
        *("--scalellm.frontend.tenants", str(tenants)),
    )
    with contextlib.ExitStack() as stack:
        yield _start(stack, folder / "server.log", DEMO_MODEL, *options)


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="free-key", max_retries=0) as made:
        yield made


def metric(server: Server, name: str) -> float:
    """A sample's value, summed over labels."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0] == name)


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)  # another process: there is nothing to wait on


class Stream(threading.Thread):
    """A streamed completion of a fixed length, read as it comes."""

    def __init__(self, client: Any, tokens: int, **more: Any) -> None:
        super().__init__(daemon=True)
        self.client, self.tokens, self.more = client, tokens, more
        self.text = ""
        self.times: list[float] = []
        self.first = threading.Event()
        self.start()

    def run(self) -> None:
        extra = {"min_tokens": self.tokens, **self.more}  # no end, and so text all the way
        stream = self.client.completions.create(
            model="demo",
            prompt="The capital of",
            max_tokens=self.tokens,
            temperature=0,
            stream=True,
            extra_body=extra,
        )
        for event in stream:
            self.text += event.choices[0].text
            self.times.append(time.monotonic())
            self.first.set()


def test_the_urgent_displaces_and_the_displaced_says_the_same(server: Server, client: Any) -> None:
    """Both seats are taken by long answers of a lower class; a higher one has its turn at once."""
    alone = Stream(client, LONG)
    alone.join(LIMIT_S)
    preempted = metric(server, "vllm:num_preemptions_total")
    low = [Stream(client, LONG, priority=5) for _ in range(SEATS)]
    for one in low:
        assert one.first.wait(LIMIT_S)
    urgent = Stream(client, 5, priority=1)
    urgent.join(LIMIT_S)
    assert all(one.is_alive() for one in low), "it did not wait for their ends"
    for one in low:
        one.join(LIMIT_S)
    assert metric(server, "vllm:num_preemptions_total") == preempted + 1
    assert len(alone.text) > LONG
    assert [one.text for one in low] == [alone.text] * SEATS
    until(lambda: metric(server, "vllm:kv_cache_usage_perc") == 0, "all blocks are free")


@pytest.mark.parametrize("more", [{}, {"logprobs": 1}], ids=["fast lane", "full lane"])
@pytest.mark.parametrize("streamed", [False, True])
def test_what_cannot_be_in_time_is_told_so_before_it_is_computed(
    server: Server, client: Any, more: dict[str, Any], streamed: bool
) -> None:
    """Both seats are taken by work of the same class, which nothing displaces."""
    Stream(client, 50).join(LIMIT_S)  # steps take some time: that is learnt
    low = [Stream(client, LONG) for _ in range(SEATS)]
    for one in low:
        assert one.first.wait(LIMIT_S)
    prompts = metric(server, "vllm:prompt_tokens_total")
    with pytest.raises(openai.InternalServerError) as told:
        client.completions.create(
            model="demo",
            prompt="The capital of",
            max_tokens=5,
            stream=streamed,
            extra_headers={"X-Scalellm-TTFT-Ms": "20"},
            extra_body=more,
        )
    assert told.value.status_code == 504
    assert "deadline: the first token cannot come within 20 ms any more" in told.value.message
    assert told.value.response.headers["x-should-retry"] == "false"
    for one in low:
        one.join(LIMIT_S)
        assert len(one.text) > LONG, "the others notice nothing"
    assert metric(server, "vllm:prompt_tokens_total") == prompts, "nothing of it was computed"


@pytest.mark.parametrize("more", [{}, {"logprobs": 1}], ids=["fast lane", "full lane"])
def test_a_quota_that_is_used_up_is_told_with_the_time_to_come_back(
    server: Server, more: dict[str, Any]
) -> None:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="metered-key", max_retries=0
    ) as metered:
        ask = {"model": "demo", "prompt": "The capital of", "extra_body": more}

        def spend() -> None:
            for _ in range(20):
                metered.completions.create(**ask, max_tokens=40)

        with pytest.raises(openai.RateLimitError) as told:
            spend()
    assert "tenant 'metered' has used up its 60 tokens per minute" in told.value.message
    assert 1 <= int(told.value.response.headers["retry-after"]) <= 60
