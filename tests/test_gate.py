"""The gate on real connections: uvicorn and the connection class of the workers, without vLLM."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import prometheus_client
import uvicorn
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from scalellm_plugins.frontends import counting, refusals
from scalellm_plugins.frontends.accounting import Accounting
from scalellm_plugins.frontends.admission import SERVER, Admission
from scalellm_plugins.frontends.connection import FastLaneProtocol
from scalellm_plugins.frontends.gate import GUARDED, Gate
from scalellm_plugins.frontends.headers import CrossOrigin
from scalellm_plugins.frontends.limits import Limits
from scalellm_plugins.frontends.tenants import TenantFile

CHAT = "/v1/chat/completions"
NOTHING = [0, 0, 0, 0]


class Application:
    """Stands for vLLM's: each request waits until it is told how to go on."""

    def __init__(self) -> None:
        self.state = SimpleNamespace()
        self.user_middleware = [Middleware(CORSMiddleware, allow_origins=["*"])]
        self.middleware_stack = None
        self.waiting: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()
        self.passes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.passes.append(counting.current.get())
        if scope["path"] in GUARDED:
            go_on: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            await self.waiting.put(go_on)
            outcome = await go_on
            if callable(outcome):
                outcome()
        headers = [(b"content-length", b"2"), (b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})


class Client:
    """One connection, spoken to in bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, path: str, body: bytes = b"{}", *lines: str, method: str = "POST") -> None:
        head = [f"{method} {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *lines]
        self.writer.write("\r\n".join([*head, "", ""]).encode("latin-1") + body)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 30)).decode("latin-1")
        status, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
        body = await self.reader.readexactly(int(headers["content-length"]))
        return int(status.split()[1]), headers, body

    async def closed(self) -> bool:
        return await asyncio.wait_for(self.reader.read(), 30) == b""


class Stand:
    """Server, gate and counters of one test."""

    def __init__(self, gate: Gate, application: Application, server: uvicorn.Server) -> None:
        self.gate, self.application, self.server = gate, application, server
        self.clients: list[Client] = []

    async def client(self) -> Client:
        port = self.server.servers[0].sockets[0].getsockname()[1]
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        self.clients.append(client)
        return client

    async def inside(self) -> asyncio.Future[Any]:
        """A request that has reached the application; its future lets it go on."""
        return await asyncio.wait_for(self.application.waiting.get(), 30)

    def used(self, tenant: str | None = None) -> list[int]:
        counters = self.gate.counters
        return counters.used(SERVER if tenant is None else counters.index(tenant))

    async def until(self, condition: Callable[[], bool]) -> None:
        async def poll() -> None:
            while not condition():
                await asyncio.sleep(0.005)

        await asyncio.wait_for(poll(), 30)


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Make a stand with limits and tenants (each with the key "NAME-key")."""
    made: list[tuple[Stand, asyncio.Task[None]]] = []

    async def make(*tenants: dict[str, Any], api_keys: Any = (), **options: Any) -> Stand:
        path = None
        if tenants:
            entries = [
                {"keys": [hashlib.sha256(f"{t['name']}-key".encode()).hexdigest()], **t}
                for t in tenants
            ]
            path = str(tmp_path / "tenants.json")
            Path(path).write_text(json.dumps(entries))
        application = Application()
        echo = options.pop("echo_id", False)
        gate = Gate(
            Admission.private(),
            TenantFile(path, api_keys),
            Limits(**options),
            Accounting(application),
            CrossOrigin(application),
            echo_id=echo,
        )
        application.state.scalellm_gate = gate
        config = uvicorn.Config(
            application, port=0, http=FastLaneProtocol, log_level="warning", lifespan="off"
        )
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None
        task = asyncio.create_task(server.serve())
        stand = Stand(gate, application, server)
        made.append((stand, task))
        await stand.until(lambda: server.started)
        return stand

    yield make
    for stand, task in made:
        for client in stand.clients:
            client.writer.close()
        while not stand.application.waiting.empty():
            stand.application.waiting.get_nowait().set_result(None)
        stand.server.should_exit = True
        stand.server.force_exit = True
        await asyncio.wait_for(task, 30)


async def test_a_request_counts_until_it_is_answered(stand: Any) -> None:
    here = await stand(max_requests=1)
    first, second = await here.client(), await here.client()
    first.send(CHAT)
    go_on = await here.inside()
    assert here.used() == here.used("default") == [1, 1, 0, 0]
    second.send(CHAT)
    status, headers, body = await second.answer()
    error = json.loads(body)["error"]
    assert (status, error["code"], error["type"]) == (503, 503, "Service Unavailable")
    assert "--scalellm.frontend.max_requests" in error["message"]
    assert 1 <= int(headers["retry-after"]) <= 60
    go_on.set_result(None)
    assert (await first.answer())[0] == 200
    # The next one on the same connection finds room at once, and so does the one refused before.
    assert here.used() == NOTHING
    second.send(CHAT)
    (await here.inside()).set_result(None)
    assert (await second.answer())[0] == 200
    assert here.used() == NOTHING


async def test_only_work_for_the_engine_is_counted(stand: Any) -> None:
    here = await stand(max_requests=1)
    client, other = await here.client(), await here.client()
    client.send(CHAT)
    go_on = await here.inside()
    for path, method in [("/health", "GET"), ("/v1/models", "GET"), ("/tokenize", "POST")]:
        other.send(path, method=method)
        assert (await other.answer())[0] == 200
    assert here.application.passes[0] is not None
    assert here.application.passes[1:] == [None] * 3
    assert here.used()[0] == 1
    go_on.set_result(None)
    await client.answer()


async def test_a_client_that_goes_away_is_counted_until_the_application_has_done(
    stand: Any,
) -> None:
    here = await stand(max_requests=1)
    client = await here.client()
    client.send(CHAT)
    go_on = await here.inside()
    client.writer.close()
    await here.until(lambda: not here.server.server_state.connections)
    assert here.used()[0] == 1, "the engine still works on it"
    go_on.set_result(None)
    await here.until(lambda: here.used() == NOTHING)


async def test_an_application_that_fails_gives_the_room_back(stand: Any) -> None:
    here = await stand(max_requests=1)
    client = await here.client()
    client.send(CHAT)

    def fail() -> None:
        raise RuntimeError("as if vLLM had")

    (await here.inside()).set_result(fail)
    assert (await client.answer())[0] == 500
    await here.until(lambda: here.used() == NOTHING)


async def test_tenants_by_their_keys(stand: Any) -> None:
    here = await stand({"name": "acme", "max_requests": 1}, {"name": "other"}, api_keys=["vllm"])
    clients = [await here.client() for _ in range(4)]
    keys = ["acme-key", "other-key", "vllm", "acme-key"]
    for client, key in zip(clients, keys, strict=True):
        client.send(CHAT, b"{}", f"Authorization: Bearer {key}")
        if client is not clients[3]:
            await here.inside()
    status, _, body = await clients[3].answer()
    assert status == 429
    assert "'acme'" in json.loads(body)["error"]["message"]
    assert "max_requests in the tenants file" in json.loads(body)["error"]["message"]
    used = [here.used(name)[0] for name in ("acme", "other", "default")]
    assert used == [1, 1, 1]
    assert here.application.passes[0].bound.extra == {
        "scalellm_tenant": "acme",
        "scalellm_weight": 1.0,
    }


async def test_no_key_is_no_work_of_the_gate(stand: Any) -> None:
    """vLLM's own middleware says 401; a stranger must not take up room or go to the fast lane."""
    here = await stand({"name": "acme", "max_requests": 1})
    here.application.state.scalellm_lane = SimpleNamespace(
        may_take=lambda _: pytest.fail("a request without a key was offered to the fast lane"),
        accounting=SimpleNamespace(own_log=False),
    )
    for key in (None, "wrong"):
        client = await here.client()
        client.send(CHAT, b"{}", *([f"Authorization: Bearer {key}"] if key else []))
        (await here.inside()).set_result(None)
        await client.answer()
    assert here.application.passes == [None, None]
    assert here.used() == NOTHING


async def test_a_small_body_that_nobody_reads_leaves_the_connection_usable(stand: Any) -> None:
    here = await stand(max_requests=1)
    first, second = await here.client(), await here.client()
    first.send(CHAT)
    go_on = await here.inside()
    body = b"x" * refusals.SMALL
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    second.writer.write(head)
    status, headers, _ = await second.answer()  # before a byte of the body was sent
    assert status == 503
    assert "connection" not in headers
    second.writer.write(body)
    second.send("/health", method="GET")
    assert (await second.answer())[0] == 200
    go_on.set_result(None)
    await first.answer()


@pytest.mark.parametrize("framing", ["content-length: 50000000", "transfer-encoding: chunked"])
async def test_a_large_body_is_not_waited_for(stand: Any, framing: str) -> None:
    here = await stand(max_requests=1)
    first, second = await here.client(), await here.client()
    first.send(CHAT)
    go_on = await here.inside()
    second.writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{framing}\r\n\r\n".encode())
    # A megabyte is on its way when the answer is written: closing then would reset it away.
    second.writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
    second.writer.write(b"x" * 2**20)
    status, headers, body = await second.answer()
    assert status == 503
    assert headers["connection"] == "close"
    assert json.loads(body)["error"]["code"] == 503
    assert await second.closed()
    second.writer.close()
    await here.until(lambda: len(here.server.server_state.connections) == 1)
    go_on.set_result(None)
    await first.answer()


async def test_a_client_that_waits_to_be_told_to_go_on_is_not(stand: Any) -> None:
    here = await stand(max_requests=1)
    first, second = await here.client(), await here.client()
    first.send(CHAT)
    go_on = await here.inside()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\nexpect: 100-continue\r\n\r\n"
    second.writer.write(head.encode())
    status, headers, _ = await second.answer()
    assert (status, headers["connection"]) == (503, "close")
    assert await second.closed()
    go_on.set_result(None)
    await first.answer()


async def test_requests_in_a_pipeline_come_one_by_one(stand: Any) -> None:
    here = await stand(max_requests=1)
    client = await here.client()
    for _ in range(3):
        client.send(CHAT)
    for _ in range(3):
        go_on = await here.inside()
        assert here.used()[0] == 1
        go_on.set_result(None)
        assert (await client.answer())[0] == 200
    assert here.used() == NOTHING


async def test_a_refusal_answers_like_the_server(stand: Any) -> None:
    """CORS for browsers, the request's id, Anthropic's shape on Anthropic's route."""
    here = await stand(max_requests=1, echo_id=True)
    first, second = await here.client(), await here.client()
    first.send(CHAT)
    go_on = await here.inside()
    second.send("/v1/messages", b"{}", "X-Request-Id: mine", "Origin: http://site")
    _, headers, body = await second.answer()
    assert headers["x-request-id"] == "mine"
    assert headers["access-control-allow-origin"] == "*"
    assert headers["content-type"] == "application/json"
    assert {"server", "date"} <= set(headers)
    assert json.loads(body)["error"]["type"] == "overloaded_error"
    go_on.set_result(None)
    await first.answer()


async def test_a_prompt_that_is_too_long_changes_the_applications_answer(stand: Any) -> None:
    here = await stand(max_prompt_tokens=100)
    first, second = await here.client(), await here.client()
    first.send(CHAT)
    go_on = await here.inside()
    assert here.application.passes[0].count(60)
    assert here.used() == [1, 1, 60, 60]
    second.send(CHAT)
    late = await here.inside()
    late.set_result(lambda: here.application.passes[1].count(50))
    status, headers, body = await second.answer()
    assert status == 503
    assert headers["content-type"] == "application/json"
    assert "retry-after" in headers
    message = json.loads(body)["error"]["message"]
    assert "60 prompt tokens in flight, this request brings 50" in message
    assert here.used() == [1, 1, 60, 60]
    go_on.set_result(None)
    assert (await first.answer())[0] == 200
    assert here.used() == NOTHING


async def test_refusals_and_use_are_on_the_metrics(stand: Any) -> None:
    def value(name: str, **labels: str) -> float:
        return prometheus_client.REGISTRY.get_sample_value(name, labels) or 0.0

    labels = {"tenant": "metered", "limit": "tenant.max_requests"}
    name = "scalellm:admission_rejections_total"
    before = value(name, **labels)
    here = await stand({"name": "metered", "max_requests": 1})
    first, second = await here.client(), await here.client()
    first.send(CHAT, b"{}", "Authorization: Bearer metered-key")
    go_on = await here.inside()
    second.send(CHAT, b"{}", "Authorization: Bearer metered-key")
    await second.answer()
    assert value(name, **labels) == before + 1
    here.gate.tick()
    assert value("scalellm:admission_requests", tenant="metered") == 1
    go_on.set_result(None)
    await first.answer()
    here.gate.tick()
    assert value("scalellm:admission_requests", tenant="metered") == 0


async def test_a_changed_file_counts_from_the_next_request_on(stand: Any, tmp_path: Path) -> None:
    here = await stand({"name": "acme", "max_requests": 1})
    first, second = await here.client(), await here.client()
    first.send(CHAT, b"{}", "Authorization: Bearer acme-key")
    await here.inside()
    entry = {"name": "acme", "max_requests": 2, "weight": 3}
    entry["keys"] = [hashlib.sha256(b"new-key").hexdigest()]
    (tmp_path / "tenants.json").write_text(json.dumps([entry]))
    assert here.gate.tenants.poll()
    here.gate.tick()
    second.send(CHAT, b"{}", "Authorization: Bearer new-key")
    await here.inside()
    assert here.used("acme")[0] == 2, "the same tenant, counted on"
