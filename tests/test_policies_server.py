"""Policies on a real server, seen through the openai client: real vLLM, the demo model, the CPU."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

openai = pytest.importorskip("openai")

if TYPE_CHECKING:
    from .conftest import Server

pytestmark = [pytest.mark.vllm, pytest.mark.server]

SEATS, LONG = 2, 1500
LIMIT_S = 120.0

# Questions to which the demo model knows the answer: its greedy text does not hang on rounding,
# which differs with the size of a batch.
QUESTIONS = ("What is 2 + 3?", "What is 4 + 5?", "What is 7 - 2?")


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Any]:
    """Seats for two, and `priority,deadline`."""
    import contextlib

    from .conftest import DEMO_MODEL, _start

    log = tmp_path_factory.mktemp("policies") / "server.log"
    options = (
        *("--plugins", "scalellm", "--scalellm.strict", "--enforce-eager"),
        *("--served-model-name", "demo", "--max-model-len", "2048"),
        *("--max-num-seqs", str(SEATS), "--scalellm.scheduler.policy", "priority"),
    )
    with contextlib.ExitStack() as stack:
        yield _start(stack, log, DEMO_MODEL, *options)


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
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
        extra = {"ignore_eos": True, **self.more}
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
    assert [one.text for one in low] == [alone.text] * SEATS
    until(lambda: metric(server, "vllm:kv_cache_usage_perc") == 0, "all blocks are free")
