"""State of a server with three workers: whichever is asked, the answer is the server's.

One server for all tests, on a simulated GPU. Connections are held open to each of the workers, so
that a test says which one it asks.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[1]
LIMIT_S = 120.0
WORKERS = 3
MAX_REQUESTS = 12
MAX_TOKENS = 900
MODEL = ("--served-model-name", "demo", "--max-model-len", "2048", "--enable-lora")
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    "VLLM_LOG_STATS_INTERVAL": "1",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "300",
}


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Three workers on a simulated GPU that is slow enough to be watched."""
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    options = (
        *("--plugins", "scalellm,scalellm.sim", "--scalellm.strict", "--scalellm.sim.speed", "0.5"),
        *("--scalellm.frontend.workers", str(WORKERS), "--enable-server-load-tracking"),
        *("--max-num-queued-reqs", str(MAX_REQUESTS), "--max-num-queued-tokens", str(MAX_TOKENS)),
        *MODEL,
    )
    log = tmp_path_factory.mktemp("cross_worker") / "server.log"
    with ExitStack() as stack:
        started = conftest._start(
            stack, log, ROOT / "examples" / "demo_model", *options, **ENVIRONMENT
        )
        started.conftest = conftest
        until(lambda: len(workers(started)) == WORKERS, "the workers are there")
        until(lambda: serving(started) >= WORKERS, "the workers serve")
        yield started
    text = log.read_text()
    assert "Traceback" not in text.partition("[shutdown]")[0], text[-6000:]


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for something that another process does."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


def serving(server: Any) -> int:
    """How many workers have come up so far."""
    return int(server.log.read_text().count("Application startup complete"))


def workers(server: Any) -> dict[int, int]:
    """Slot → process id."""
    titles = server.processes().items()
    return {int(t.rpartition("_")[2]): pid for pid, t in titles if t.startswith("VLLM::APIServer_")}


class Client:
    """One connection, kept open, to one worker."""

    def __init__(self, server: Any) -> None:
        host, _, port = server.url.removeprefix("http://").partition(":")
        self._server_port = int(port)
        self.connection = http.client.HTTPConnection(host, int(port), timeout=LIMIT_S)
        self.get("/version")
        self.pid = self._owner(set(workers(server).values()))

    def _owner(self, pids: set[int]) -> int:
        """The process that holds the other end, found in /proc."""
        ours = f"{self.connection.sock.getsockname()[1]:04X}"
        theirs = f"{self._server_port:04X}"
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(f":{theirs}") and fields[2].endswith(f":{ours}"):
                inode = f"socket:[{fields[9]}]"
        for pid in pids:
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    if os.readlink(entry) == inode:
                        return pid
                except OSError:  # closed while we looked
                    continue
        raise AssertionError(f"no worker holds {inode}")

    def start(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        """Send a request; return the response, unread."""
        text = None if body is None else json.dumps(body)
        self.connection.request(method, path, text, {"content-type": "application/json"})
        return self.connection.getresponse()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Return status and text."""
        response = self.start(method, path, body)
        return response.status, response.read().decode()

    def get(self, path: str) -> Any:
        """GET a text or JSON document."""
        status, text = self.ask("GET", path)
        assert status == 200, (path, status, text)
        return json.loads(text) if text.startswith(("{", "[")) else text

    def post(self, path: str, body: Any) -> Any:
        """POST and return the JSON answer."""
        status, text = self.ask("POST", path, body)
        assert status == 200, (path, status, text)
        return json.loads(text) if text.startswith("{") else text


@pytest.fixture
def clients(server: Any) -> Iterator[list[Client]]:
    """A connection to each worker, by slot."""
    with connected(server) as found:
        yield found


@contextmanager
def connected(server: Any) -> Iterator[list[Client]]:
    until(lambda: len(workers(server)) == WORKERS, "every slot has a worker")
    opened: list[Client] = []
    by_pid: dict[int, Client] = {}
    slots = workers(server)
    try:
        while set(by_pid) != set(slots.values()):
            assert len(opened) < 200, "connections do not reach every worker"
            opened.append(Client(server))
            by_pid.setdefault(opened[-1].pid, opened[-1])
        yield [by_pid[pid] for _, pid in sorted(slots.items())]
    finally:
        for client in opened:
            client.connection.close()


def completion(tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "Hello", "max_tokens": tokens, "ignore_eos": True, **more}


def samples(text: str) -> dict[str, float]:
    """`name{labels}` → value; fails on a sample that is there twice."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert name not in found, f"{name} is there twice"
            found[name] = float(value)
    return found


def one(text: str, name: str) -> float:
    """The value of the only sample with this name."""
    ((_, value),) = [
        (key, value) for key, value in samples(text).items() if key.partition("{")[0] == name
    ]
    return value


# Metrics


def test_one_scrape_is_the_whole_server(clients: list[Client]) -> None:
    before = one(clients[0].get("/metrics"), "vllm:generation_tokens_total")
    for tokens, client in zip((3, 5, 7), clients, strict=True):
        assert client.post("/v1/completions", completion(tokens))["usage"]
        # Through vLLM's own code, too: the fast lane does not know logprobs.
        assert client.post("/v1/completions", completion(tokens, logprobs=1))["usage"]
    for client in clients:
        text = client.get("/metrics")
        assert one(text, "vllm:generation_tokens_total") == before + 30
        assert one(text, "vllm:num_requests_running") == 0
        share = one(text, "scalellm:gateway_seconds_total") / one(
            text, "scalellm:request_seconds_total"
        )
        assert one(text, "scalellm:gateway_share") == pytest.approx(share)
        assert client.get("/metrics/").splitlines()[0] == text.splitlines()[0]


def test_a_workers_death_takes_no_count_away(server: Any, clients: list[Client]) -> None:
    clients[1].post("/v1/completions", completion(9))
    before = samples(clients[0].get("/metrics"))
    up = serving(server)
    os.kill(clients[1].pid, signal.SIGKILL)
    until(lambda: serving(server) > up, "a worker in its place")
    with connected(server) as again:
        after = samples(again[0].get("/metrics"))
        counts = re.compile(r"\S+_(total|count|sum|bucket)($|\{)")
        lost = {
            name: (value, after.get(name))
            for name, value in before.items()
            if counts.match(name) and after.get(name, -1.0) < value
        }
        assert not lost
        again[1].post("/v1/completions", completion(4))
        now = samples(again[2].get("/metrics"))
    name = 'vllm:generation_tokens_total{engine="0",model_name="demo"}'
    assert now[name] == before[name] + 4


def test_running_requests_are_the_engines_whoever_heard_last(clients: list[Client]) -> None:
    """Streams on every worker: each hears some of the engine's messages and none all."""
    responses = [
        client.start("POST", "/v1/completions", completion(150, stream=True))
        for client in clients[1:]
    ]
    for response in responses:
        response.readline()
    seen = one(clients[0].get("/metrics"), "vllm:num_requests_running")
    for response in responses:
        response.read()
    assert seen == 2
    until(
        lambda: all(one(c.get("/metrics"), "vllm:num_requests_running") == 0 for c in clients),
        "nothing runs",
    )


def test_names_and_labels_are_those_of_one_process(
    server: Any, clients: list[Client], serve: Any
) -> None:
    """vLLM's own server, as one process, after the same requests."""
    options = ("--plugins", "scalellm.sim", *MODEL)
    alone = serve(ROOT / "examples" / "demo_model", *options, **ENVIRONMENT)
    theirs = Client.__new__(Client)
    host, _, port = alone.url.removeprefix("http://").partition(":")
    theirs.connection = http.client.HTTPConnection(host, int(port), timeout=LIMIT_S)
    texts = []
    for client in (clients[2], theirs):
        client.post("/v1/completions", completion(3))
        client.post("/v1/completions", completion(3, logprobs=1, stream=True))
        client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
        texts.append(client.get("/metrics"))
    # Of one process's own, which vLLM's servers of several processes do not have either.
    own = re.compile(r"(# (HELP|TYPE) )?(process_|python_gc_)")
    # Of other requests of this module, and what this package adds.
    other = re.compile(r'(# (HELP|TYPE) )?scalellm:|http_.*handler="(?!/v1/(chat/)?completions)')

    def names(text: str) -> set[str]:
        lines = {
            line if line.startswith("#") else line.rpartition(" ")[0] for line in text.splitlines()
        }
        return {
            _without_running_loras(line)
            for line in lines
            if not own.match(line) and not other.match(line)
        }

    ours, vllms = (names(text) for text in texts)
    assert vllms - ours == set()
    assert {name for name in ours - vllms if 'status="4xx"' not in name} == set()


def _without_running_loras(line: str) -> str:
    return re.sub(r'(running|waiting)_lora_adapters="[^"]*"', r"\1", line)


# LoRA adapters


def names(client: Client) -> list[str]:
    return [model["id"] for model in client.get("/v1/models")["data"]]


def test_an_adapter_is_there_for_every_worker(server: Any, clients: list[Client]) -> None:
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    clients[1].post(load, {"lora_name": "one", "lora_path": "/nowhere/one"})
    for client in clients:  # the moment it is answered
        assert names(client) == ["demo", "one"]
        assert client.post("/v1/completions", completion(2) | {"model": "one"})["model"] == "one"
    # Another worker knows that it is loaded, and may unload it.
    status, text = clients[2].ask("POST", load, {"lora_name": "one", "lora_path": "/nowhere/one"})
    assert (status, "already been" in text) == (400, True)
    clients[0].post(load, {"lora_name": "two", "lora_path": "/nowhere/two"})
    up = serving(server)
    os.kill(clients[2].pid, signal.SIGKILL)
    until(lambda: serving(server) > up, "a worker in its place")
    with connected(server) as again:  # the new one has learnt them
        assert names(again[2]) == ["demo", "one", "two"]
        again[2].post(unload, {"lora_name": "one"})
        for client in again:
            assert names(client) == ["demo", "two"]
            status, _ = client.ask("POST", "/v1/completions", completion(2) | {"model": "one"})
            assert status == 404
        again[0].post(unload, {"lora_name": "two"})


def test_ids_of_adapters_do_not_collide(clients: list[Client]) -> None:
    """Loaded on all workers at the same moment; the engine knows adapters by their ids."""
    jobs = [(client, f"many{number}") for number, client in enumerate(clients * 3)]

    def load(slot: int) -> None:
        for client, name in jobs[slot::WORKERS]:
            client.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": f"/x/{name}"})

    with ThreadPoolExecutor(WORKERS) as threads:
        list(threads.map(load, range(WORKERS)))
    expected = {"demo", *(name for _, name in jobs)}
    assert [set(names(client)) for client in clients] == [expected] * WORKERS
    for client, name in jobs:
        client.post("/v1/unload_lora_adapter", {"lora_name": name})
    assert [names(client) for client in clients] == [["demo"]] * WORKERS


# The statistics line


def test_one_statistics_line_for_all_workers(server: Any, clients: list[Client]) -> None:
    line = re.compile(
        r"ApiServer_(\d+).*Engine 000: Avg prompt throughput.*generation throughput: ([\d.]+)"
    )

    def lines() -> list[tuple[str, str]]:
        return line.findall(server.log.read_text())

    def quiet() -> bool:
        count = len(lines())
        return bool(count) and lines()[-1][1] == "0.0"

    clients[0].post("/v1/completions", completion(1))
    until(quiet, "what other tests did is logged")
    before = len(lines())
    for client in clients[1:]:
        client.post("/v1/completions", completion(120))
    until(lambda: len(lines()) > before and quiet(), "the line is written")
    fresh = lines()[before:]
    assert {slot for slot, _ in fresh} == {"0"}
    # One line a second, more or less: what they add up to is what the other workers generated.
    assert sum(float(rate) for _, rate in fresh) == pytest.approx(240, rel=0.3)
