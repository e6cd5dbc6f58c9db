"""State of a server with three workers: whichever is asked, the answer is the server's.

One server for all tests, and so one file however long: its start takes longer than they do. It has
a simulated GPU. Connections are held open to each of the workers, so
that a test says which one it asks.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from .cross_worker import (
    LIMIT_S,
    WORKERS,
    Client,
    completion,
    connected,
    names,
    one,
    response,
    samples,
    serving,
    until,
    workers,
)

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[1]
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
        until(lambda: len(workers(started)) == WORKERS, "the workers are there")
        until(lambda: serving(started) >= WORKERS, "the workers serve")
        yield started
    text = log.read_text()
    assert "Traceback" not in text.partition("[shutdown]")[0], text[-6000:]


@pytest.fixture
def clients(server: Any) -> Iterator[list[Client]]:
    """A connection to each worker, by slot."""
    with connected(server) as found:
        yield found


# Metrics


def test_one_scrape_is_the_whole_server(clients: list[Client]) -> None:
    before = one(clients[0].get("/metrics"), "vllm:generation_tokens_total")
    for tokens, client in zip((3, 5, 7), clients, strict=True):
        assert client.post("/v1/completions", completion(tokens))["usage"]
        # Through vLLM's own code, too: the fast lane does not know logprobs.
        assert client.post("/v1/completions", completion(tokens, logprobs=1))["usage"]
    for client in clients:
        # What is counted is written down ten times a second.
        until(
            lambda client=client: (
                one(client.get("/metrics"), "vllm:generation_tokens_total") >= before + 30
            ),
            "all is counted",
        )
        text = client.get("/metrics")
        assert one(text, "vllm:generation_tokens_total") == before + 30
        share = one(text, "scalellm:gateway_seconds_total") / one(
            text, "scalellm:request_seconds_total"
        )
        assert one(text, "scalellm:gateway_share") == pytest.approx(share)
        assert client.get("/metrics/").splitlines()[0] == text.splitlines()[0]


def test_a_workers_death_takes_no_count_away(server: Any, clients: list[Client]) -> None:
    name = 'vllm:generation_tokens_total{engine="0",model_name="demo"}'

    def counted() -> float:
        return samples(clients[0].get("/metrics"))[name]

    start = counted()
    clients[1].post("/v1/completions", completion(9))
    until(lambda: counted() == start + 9, "they are counted")
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
        until(lambda: samples(again[2].get("/metrics"))[name] == before[name] + 4, "it goes on")


def test_running_requests_are_the_engines_whoever_heard_last(clients: list[Client]) -> None:
    """Streams on every worker: each hears some of the engine's messages and none all."""
    answers = [
        client.start("POST", "/v1/completions", completion(150, stream=True))
        for client in clients[1:]
    ]
    for answer in answers:
        answer.readline()
    until(lambda: one(clients[0].get("/metrics"), "vllm:num_requests_running") == 2, "both run")
    for answer in answers:
        answer.read()
    until(
        lambda: all(one(c.get("/metrics"), "vllm:num_requests_running") == 0 for c in clients),
        "nothing runs",
    )


def test_names_and_labels_are_those_of_one_process(clients: list[Client], serve: Any) -> None:
    """vLLM's own server, as one process, after the same requests."""
    options = ("--plugins", "scalellm.sim", *MODEL)
    alone = serve(ROOT / "examples" / "demo_model", *options, **ENVIRONMENT)
    alone_client = Client(alone)
    for client in (clients[2], alone_client):
        client.post("/v1/completions", completion(3))
        client.post("/v1/completions", completion(3, logprobs=1, stream=True))
        client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
    # Of one process's own, which vLLM's servers of several processes do not have either.
    own = re.compile(r"(# (HELP|TYPE) )?(process_|python_gc_)")
    # Of other requests of this module, and what this package adds.
    other = re.compile(r'(# (HELP|TYPE) )?scalellm:|http_.*handler="(?!/v1/(chat/)?completions)')

    def described(text: str) -> set[str]:
        lines = {
            line if line.startswith("#") else line.rpartition(" ")[0] for line in text.splitlines()
        }
        return {
            _without_running_loras(line)
            for line in lines
            if not own.match(line) and not other.match(line)
        }

    vllms = described(alone_client.get("/metrics"))
    until(lambda: vllms <= described(clients[2].get("/metrics")), "all is counted")
    ours = described(clients[2].get("/metrics"))
    assert {name for name in ours - vllms if 'status="4xx"' not in name} == set()


def _without_running_loras(line: str) -> str:
    return re.sub(r'(running|waiting)_lora_adapters="[^"]*"', r"\1", line)


# LoRA adapters


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


# Limits on what is queued


@pytest.mark.parametrize("lane", ["fast", "full", "both"])
def test_requests_are_limited_over_all_workers(server: Any, lane: str) -> None:
    """Three times as many as there may be, at the same moment, spread over the workers."""
    with ExitStack() as stack:
        groups = [stack.enter_context(connected(server)) for _ in range(MAX_REQUESTS)]
        everyone = [client for group in groups for client in group]
        barrier = threading.Barrier(len(everyone))

        def ask(number: int) -> int:
            full = lane == "full" or (lane == "both" and number % 2)
            body = completion(300, **({"logprobs": 1} if full else {}))
            barrier.wait(LIMIT_S)
            return everyone[number].ask("POST", "/v1/completions", body)[0]

        with ThreadPoolExecutor(len(everyone)) as threads:
            statuses = list(threads.map(ask, range(len(everyone))))
    # 300 tokens take seconds: nobody is done when the last one asks.
    assert statuses.count(200) == MAX_REQUESTS
    assert statuses.count(503) == len(statuses) - MAX_REQUESTS


@contextmanager
def held(server: Any) -> Iterator[None]:
    """Stop the engine for a while: what is let in meanwhile waits for its first token."""
    (engine,) = [pid for pid, title in server.processes().items() if "EngineCore" in title]
    os.kill(engine, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine, signal.SIGCONT)


PROMPT = 300
LET_IN = 3
"""As many as it takes until MAX_TOKENS wait: the next one finds no room."""


def crowd(server: Any, clients: list[Client], kinds: list[dict[str, Any]]) -> list[int]:
    """Ask with all at the same moment, while the engine is held; return their statuses."""
    barrier = threading.Barrier(len(clients))

    def ask(number: int) -> int:
        body = completion(3, prompt=[5] * PROMPT, **kinds[number % len(kinds)])
        barrier.wait(LIMIT_S)
        return clients[number].ask("POST", "/v1/completions", body)[0]

    with ThreadPoolExecutor(len(clients)) as threads:
        with held(server):
            jobs = [threads.submit(ask, number) for number in range(len(clients))]
            deadline = time.monotonic() + 30
            while sum(job.done() for job in jobs) < len(jobs) - LET_IN:
                if time.monotonic() > deadline:
                    break  # too many were let in, and wait
                time.sleep(0.02)
        return [job.result() for job in jobs]


STREAMED, FULL = {"stream": True}, {"logprobs": 1}


@pytest.mark.parametrize("kinds", [[{}, STREAMED], [FULL], [{}, FULL, STREAMED]])
def test_queued_tokens_are_limited_over_all_workers(
    server: Any, kinds: list[dict[str, Any]]
) -> None:
    """Twice, since what was queued is given back; and what was refused took nothing.

    (Streams of vLLM's own code have their status out by then, and are told by an event.)
    """
    with ExitStack() as stack:
        groups = [stack.enter_context(connected(server)) for _ in range(4)]
        everyone = [client for group in groups for client in group]
        for _ in range(2):
            statuses = crowd(server, everyone, kinds)
            assert statuses.count(200) == LET_IN
            assert statuses.count(503) == len(everyone) - LET_IN


def test_queued_tokens_of_a_dead_worker_are_not_counted(server: Any) -> None:
    with ExitStack() as stack, held(server):
        groups = [stack.enter_context(connected(server)) for _ in range(4)]
        queued = completion(3, prompt=[5] * PROMPT)
        for group in groups[:LET_IN]:
            text = json.dumps(queued)
            headers = {"content-type": "application/json"}
            group[1].connection.request("POST", "/v1/completions", text, headers)
        others = [client for group in groups for client in (group[0], group[2])]
        until(lambda: others[0].get("/load") == {"server_load": LET_IN}, "they are queued")
        status, _ = others[0].ask("POST", "/v1/completions", queued)
        assert status == 503
        dead, up = groups[0][1].pid, serving(server)
        os.kill(dead, signal.SIGKILL)
        until(lambda: workers(server).get(1, dead) != dead, "it is gone, and its queue with it")
        statuses = crowd(server, others, [{}, FULL])
        assert statuses.count(200) == LET_IN
        assert statuses.count(503) == len(others) - LET_IN
    until(lambda: serving(server) > up, "a worker in its place")


def test_what_a_dead_worker_had_queued_is_not_counted(server: Any) -> None:
    with connected(server) as clients, ExitStack() as stack:
        more = [c for _ in range(3) for c in stack.enter_context(connected(server))]
        mine = [client for client in more if client.pid == clients[1].pid]
        for client in mine:
            client.start("POST", "/v1/completions", completion(1500, stream=True)).readline()
        up = serving(server)
        os.kill(clients[1].pid, signal.SIGKILL)
        until(lambda: serving(server) > up, "a worker in its place")
    with ExitStack() as stack:
        groups = [stack.enter_context(connected(server)) for _ in range(4)]
        everyone = [client for group in groups for client in group]
        assert len(everyone) == MAX_REQUESTS
        with ThreadPoolExecutor(MAX_REQUESTS) as threads:
            asked = [
                threads.submit(client.ask, "POST", "/v1/completions", completion(100))
                for client in everyone
            ]
            assert [job.result()[0] for job in asked] == [200] * MAX_REQUESTS


# /load


def test_load_is_what_all_workers_serve(clients: list[Client], server: Any) -> None:
    until(lambda: clients[0].get("/load") == {"server_load": 0}, "nothing is served")
    with connected(server) as others:
        bodies = (
            completion(400, stream=True),  # the fast lane's
            completion(400, stream=True, logprobs=1),
            completion(400, stream=True),
        )
        responses = []
        for client, body in zip(others, bodies, strict=True):
            responses.append(client.start("POST", "/v1/completions", body))
            responses[-1].readline()
        assert [client.get("/load") for client in clients] == [{"server_load": 3}] * WORKERS
        others[2].connection.sock.close()  # a client goes away
        responses[2].close()
        until(lambda: clients[1].get("/load") == {"server_load": 2}, "it is not served any more")
        for response in responses[:2]:
            response.read()
        until(lambda: clients[2].get("/load") == {"server_load": 0}, "all are done")


# Responses


def test_a_response_is_known_to_every_worker(clients: list[Client], server: Any) -> None:
    made = clients[1].post("/v1/responses", response())
    path = f"/v1/responses/{made['id']}"
    for client in clients:
        assert client.get(path) == made
        status, text = client.ask("POST", f"{path}/cancel")
        assert (status, "Cannot cancel" in text) == (400, True)
    # Continued by another worker; the prompt is what one process makes of it.
    tokens = {
        client.post("/v1/responses", response(previous_response_id=made["id"]))["usage"][
            "input_tokens"
        ]
        for client in clients
    }
    assert len(tokens) == 1
    assert tokens.pop() > made["usage"]["input_tokens"] + made["usage"]["output_tokens"]
    up = serving(server)
    os.kill(clients[1].pid, signal.SIGKILL)
    until(lambda: serving(server) > up, "a worker in its place")
    with connected(server) as again:  # it survives the worker that made it
        assert [client.get(path) for client in again] == [made] * WORKERS
        for client in again:
            assert client.ask("GET", "/v1/responses/resp_none")[0] == 404
            body = response(previous_response_id="resp_none")
            assert client.ask("POST", "/v1/responses", body)[0] == 404


def test_a_streamed_response_is_known_too(clients: list[Client]) -> None:
    stream = clients[0].start("POST", "/v1/responses", response(stream=True)).read().decode()
    made = json.loads(stream.split("event: response.completed\ndata: ")[1].partition("\n")[0])
    found = [client.get(f"/v1/responses/{made['response']['id']}") for client in clients]
    assert [one["output"][0]["content"] for one in found] == [
        made["response"]["output"][0]["content"]
    ] * WORKERS


def test_a_background_response_goes_on_where_it_is_and_is_seen_from_everywhere(
    clients: list[Client],
) -> None:
    body = response(background=True, store=True, max_output_tokens=300)
    made = clients[2].post("/v1/responses", body)
    path = f"/v1/responses/{made['id']}"
    for client in clients:
        assert client.get(path)["status"] in ("queued", "in_progress")
    status, text = clients[0].ask(
        "POST", "/v1/responses", response(previous_response_id="resp_none")
    )
    assert status == 404, text
    until(
        lambda: all(c.get(path)["status"] in ("completed", "incomplete") for c in clients),
        "it is done",
    )
    assert clients[0].get(path) == clients[2].get(path)


def test_a_background_response_is_cancelled_from_another_worker(
    server: Any, clients: list[Client]
) -> None:
    body = response(background=True, store=True, max_output_tokens=1500)
    made = clients[2].post("/v1/responses", body)
    path = f"/v1/responses/{made['id']}"
    until(
        lambda: one(clients[0].get("/metrics"), "vllm:num_requests_running") == 1, "it is running"
    )
    assert clients[0].post(f"{path}/cancel", {})["status"] == "cancelled"
    assert [client.get(path)["status"] for client in clients] == ["cancelled"] * WORKERS
    until(
        lambda: one(clients[1].get("/metrics"), "vllm:num_requests_running") == 0,
        "the engine has stopped",
    )
    up = serving(server)
    os.kill(clients[2].pid, signal.SIGKILL)
    until(lambda: serving(server) > up, "a worker in its place")
    with connected(server) as again:  # how it ended outlives its worker
        assert [client.get(path)["status"] for client in again] == ["cancelled"] * WORKERS


def test_a_background_stream_is_followed_from_another_worker(clients: list[Client]) -> None:
    body = response(background=True, store=True, stream=True, max_output_tokens=150)
    mine = clients[0].start("POST", "/v1/responses", body)
    created = mine.readline() + mine.readline()
    made = json.loads(created.split(b"data: ")[1])["response"]["id"]
    theirs = clients[1].start("GET", f"/v1/responses/{made}?stream=true").read()
    assert theirs == created + mine.read()
    assert b"response.completed" in theirs
    later = clients[2].start("GET", f"/v1/responses/{made}?stream=true&starting_after=1").read()
    assert theirs.endswith(later)
