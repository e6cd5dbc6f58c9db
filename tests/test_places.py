"""How a server is reached and how it ends: TLS, a Unix socket, workers, two engines, SIGTERM.

Two servers, started together, for all tests of this file; the last test ends them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from . import places
from .places import LIMIT_S, Certificate, Connection, Place, Stream, completion

pytest.importorskip("cryptography")
pytestmark = pytest.mark.server

DRAIN_S = 8
"""`--shutdown-timeout` of both."""

SHORT, LONG = 100, 1900
"""Tokens, 21 ms each: the one ends within DRAIN_S and the other does not."""

OPTIONS = {
    "one process": ("--scalellm.frontend.workers", "1"),
    "workers": ("--scalellm.frontend.workers", "2", "--data-parallel-size", "2"),
}
"""Both with TLS; the workers at a Unix socket and in front of two engines."""

NAMES = tuple(OPTIONS)

Servers = dict[str, Place]


@pytest.fixture(scope="module")
def conftest(request: pytest.FixtureRequest) -> Any:
    return request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))


@pytest.fixture(scope="module")
def servers(conftest: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("places")
    made: Servers = {}
    with ExitStack() as stack, ThreadPoolExecutor(len(NAMES)) as threads:
        jobs = {}
        for name in NAMES:
            own = folder / name.replace(" ", "_")
            own.mkdir()
            certificate = Certificate.make(own)
            where: dict[str, Any] = {"path": own / "socket"}
            if name == "one process":
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    where = {"port": probe.getsockname()[1]}
            options = (
                *OPTIONS[name],
                *("--scalellm.strict", "--scalellm.sim.speed", "0.25"),
                *certificate.options(),
                *("--enable-ssl-refresh", "--shutdown-timeout", str(DRAIN_S)),
                *("--served-model-name", "demo", "--max-model-len", "2048"),
            )
            where |= {"trusted": certificate.cert}
            log = own / "log"
            jobs[name] = threads.submit(places.start, stack, conftest, log, *options, **where)
        for name, job in jobs.items():
            made[name] = job.result()
        until(lambda: started(made["workers"]) == 2, "both workers are up")
        yield made
    for name, place in made.items():
        text = place.log.read_text()
        # vLLM's single process says of streams that it cuts what they were doing.
        text = text if name == "workers" else text.partition("[shutdown]")[0]
        assert "Traceback" not in text, text[-6000:]


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for something that another process does."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def started(place: Place) -> int:
    """How many HTTP processes have come up so far."""
    return place.log.read_text().count("Application startup complete")


def processes(conftest: Any, place: Place) -> dict[int, str]:
    found: dict[int, str] = conftest._session(place.process.pid)
    return found


def text_of(answer: str, *, streamed: bool) -> str:
    if not streamed:
        return str(json.loads(answer)["choices"][0]["text"])
    assert answer.endswith("data: [DONE]\n\n")
    events = [json.loads(part[6:]) for part in answer.split("\n\n")[:-2]]
    return "".join(event["choices"][0]["text"] for event in events)


@pytest.mark.parametrize("name", NAMES)
def test_both_lanes_answer_on_one_connection(servers: Servers, name: str) -> None:
    """Bytes that went around the transport would break TLS, and the connection with it."""
    place = servers[name]
    fast = place.metric("scalellm:requests_total", lane="fast")
    full = place.metric("scalellm:requests_total", lane="full")
    connection = Connection(place)
    connection.connect()
    kept = connection.sock
    texts = set()
    for _ in range(2):
        for more in ({}, {"logprobs": 1}):  # which only vLLM's own code serves
            for streamed in (True, False):
                answer = connection.ask(completion(12, stream=streamed, **more))
                texts.add(text_of(answer, streamed=streamed))
    assert connection.sock is kept, "the server closed the connection"
    connection.close()
    assert len(texts) == 1, "the simulator's tokens are deterministic"
    until(
        lambda: place.metric("scalellm:requests_total", lane="full") == full + 4,
        "half of them were vLLM's",
    )
    assert place.metric("scalellm:requests_total", lane="fast") == fast + 4


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_leaves_is_noticed(servers: Servers, name: str) -> None:
    """How fast: test_worker_processes.py."""
    place = servers[name]
    for more in ({}, {"logprobs": 1}):
        for streamed in (True, False):
            connection = Connection(place)
            body = json.dumps(completion(LONG, stream=streamed, **more))
            connection.request(
                "POST", "/v1/completions", body, {"content-type": "application/json"}
            )
            until(lambda: place.metric("vllm:num_requests_running") == 1, "it is running")
            connection.leave("FIN")
            until(lambda: place.metric("vllm:num_requests_running") == 0, "it is aborted")


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_that_pauses_gets_everything(servers: Servers, name: str) -> None:
    """What the socket does not take is queued, and what follows comes behind it."""
    place = servers[name]
    connection = Connection(place)
    connection.connect()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    usage = {"include_usage": True, "continuous_usage_stats": True}
    response = connection.start(completion(SHORT, stream=True, stream_options=usage))
    until(lambda: place.metric("vllm:num_requests_running") == 0, "the engine has done")
    events = [line for line in response.read().split(b"\n\n") if line]
    assert events[-1] == b"data: [DONE]"
    counts = [
        json.loads(event[6:])["usage"]["completion_tokens"]
        for event in events[:-1]
        if event.startswith(b"data: ")
    ]
    assert counts == sorted(counts)
    assert counts[-1] == SHORT
    connection.close()


# Certificates


@pytest.mark.parametrize("name", NAMES)
def test_a_replaced_certificate_reaches_every_process(servers: Servers, name: str) -> None:
    """`--enable-ssl-refresh`: every worker watches the files; so does one that comes later."""
    place = servers[name]
    stream = Stream(place, 2 * SHORT)
    assert stream.first.wait(LIMIT_S)
    old = shown(place, 8)
    assert len(old) == 1
    assert place.trusted is not None
    Certificate.make(place.trusted.parent)
    # As many connections at a time as reach every worker: they take turns.
    new = until(lambda: (seen := shown(place, 8)) and not seen & old and seen, "all show the new")
    assert new == {ssl.PEM_cert_to_DER_cert(place.trusted.read_text())}
    stream.join(LIMIT_S)
    assert stream.done, "connections that are open are not disturbed"
    assert Connection(place).ask(completion(2))


def shown(place: Place, connections: int) -> set[bytes]:
    """The certificates that so many connections, open at the same time, are shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with ExitStack() as stack:
        found = set()
        for _ in range(connections):
            secure = stack.enter_context(context.wrap_socket(place.plain()))
            found.add(secure.getpeercert(binary_form=True))
        assert None not in found
        return found  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
def test_plain_text_where_tls_is_spoken_costs_nobody_anything(servers: Servers, name: str) -> None:
    place = servers[name]
    with place.plain() as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" not in plain.recv(1000)
    assert place.answers()


# A Unix socket


def test_the_sockets_file_is_as_vllm_makes_it(servers: Servers) -> None:
    path = servers["workers"].path
    assert path is not None
    umask = os.umask(0)
    os.umask(umask)
    assert path.is_socket()
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask


def test_connections_to_a_unix_socket_are_spread(servers: Servers, conftest: Any) -> None:
    place = servers["workers"]
    slots = place.workers(processes(conftest, place))
    assert set(slots) == {0, 1}
    with ExitStack() as stack:
        before = {pid: _sockets(pid) for pid in slots.values()}
        for _ in range(8):
            connection = Connection(place)
            stack.callback(connection.close)
            connection.ask(None, "/health")
        more = {pid: _sockets(pid) - before[pid] for pid in slots.values()}
    assert sum(more.values()) >= 8
    assert min(more.values()) >= 3


def _sockets(pid: int) -> int:
    return sum(
        os.readlink(entry).startswith("socket:") for entry in Path(f"/proc/{pid}/fd").iterdir()
    )


# Two engines


def test_both_engines_work_and_are_told_apart(servers: Servers, conftest: Any) -> None:
    place = servers["workers"]
    titles = processes(conftest, place).values()
    assert {title for title in titles if "EngineCore" in title} == {
        "VLLM::EngineCore_DP0",
        "VLLM::EngineCore_DP1",
    }
    engines = ("0", "1")

    def counted() -> list[float]:
        return [place.metric("vllm:generation_tokens_total", engine=engine) for engine in engines]

    def settled() -> list[float] | None:
        """What the tests before have left: metrics come up to half a second late."""
        found = counted()
        time.sleep(0.7)
        return found if found == counted() else None

    before = until(settled, "nothing is counted any more")
    streams = [Stream(place, SHORT, **({"logprobs": 1} if n % 2 else {})) for n in range(8)]
    for stream in streams:
        stream.join(LIMIT_S)
        assert (stream.done, stream.reason) == (True, "length")

    def made() -> list[float]:
        return [now - start for now, start in zip(counted(), before, strict=True)]

    until(lambda: sum(made()) == len(streams) * SHORT, "all are counted")
    # Where they were made; vLLM's balance of what two workers send at once is not always equal.
    parts = made()
    assert all(tokens >= SHORT and tokens % SHORT == 0 for tokens in parts), parts
    for engine in engines:
        until(
            lambda of=engine: place.metric("vllm:num_requests_running", engine=of) == 0, "it idles"
        )


def test_a_dead_workers_requests_leave_both_engines(servers: Servers, conftest: Any) -> None:
    place = servers["workers"]
    streams = [Stream(place, LONG) for _ in range(8)]
    until(lambda: place.metric("vllm:num_requests_running") == 8, "all are running")
    slots = place.workers(processes(conftest, place))
    os.kill(slots[1], signal.SIGKILL)
    broken = until(lambda: [s for s in streams if not s.is_alive()], "its streams broke")
    left = len(streams) - len(broken)
    assert left
    until(lambda: place.metric("vllm:num_requests_running") == left, "they are aborted")
    until(
        lambda: place.workers(processes(conftest, place)).get(1, slots[1]) != slots[1],
        "it is replaced",
    )
    for engine in ("0", "1"):
        assert place.metric("vllm:num_requests_running", engine=engine) > 0
    for stream in streams:
        if stream not in broken:
            assert stream.is_alive()
            stream.connection.leave("FIN")
    until(lambda: place.metric("vllm:num_requests_running") == 0, "clients left")
    answers = [Connection(place).ask(completion(3)) for _ in range(8)]
    assert len({text_of(answer, streamed=False) for answer in answers}) == 1


# The end


def test_a_server_that_is_told_to_end_finishes_what_runs(servers: Servers, conftest: Any) -> None:
    """SIGTERM with `--shutdown-timeout`. Last: no server is left after it."""
    with ThreadPoolExecutor(len(NAMES)) as threads:
        for job in [threads.submit(_end, conftest, name, servers[name]) for name in NAMES]:
            job.result()


def _end(conftest: Any, name: str, place: Place) -> None:
    supervised = name == "workers"
    lanes: list[dict[str, Any]] = [{}, {"logprobs": 1}]
    streams = [Stream(place, SHORT, **lane) for lane in lanes * 2]
    long = [Stream(place, LONG, **lane) for lane in lanes * 2]
    with ThreadPoolExecutor(len(lanes)) as threads:
        whole = [threads.submit(_ask, place, completion(SHORT, **lane)) for lane in lanes]
        idle = Connection(place)
        idle.ask(None, "/health")
        for stream in (*streams, *long):
            assert stream.first.wait(LIMIT_S)
        until(lambda: place.metric("vllm:num_requests_running") == 10, "all are running")
        titles = processes(conftest, place)
        # vLLM's coordinator of engines is killed, when the time is over, and leaves its sockets.
        left_behind = places.traces(pid for pid, t in titles.items() if "Coordinator" not in t)
        assert left_behind, "there is something to clean up"
        told = time.monotonic()
        place.process.send_signal(signal.SIGTERM)
        if supervised:
            until(place.refuses, "no new connections")
            assert all(stream.is_alive() for stream in streams), "what runs goes on meanwhile"
            assert idle.sock.recv(1) == b"", "connections without a request are closed"
        idle.close()
        for stream in streams:
            stream.join(LIMIT_S)
            assert (stream.done, stream.reason, stream.tokens) == (True, "length", SHORT)
        for job in whole:
            assert json.loads(job.result())["usage"]["completion_tokens"] == SHORT
    for stream in long:
        stream.join(LIMIT_S)
        assert stream.times[-1] - told > DRAIN_S - 1, "it had the time that it was promised"
        if supervised:
            assert (stream.done, stream.reason) == (True, "abort")
    assert place.process.wait(LIMIT_S) == 0
    until(lambda: not processes(conftest, place), "no process is left")
    if supervised:  # vLLM's single process leaves the engine's sockets behind
        left_behind = {path for path in left_behind if path.exists()}
        # As with vLLM, its own socket's file stays.
        assert left_behind == ({place.path} if place.path else set())


def _ask(place: Place, body: dict[str, Any]) -> str:
    connection = Connection(place)
    try:
        return connection.ask(body)
    finally:
        connection.close()
