"""Websockets at the gate, on real connections: uvicorn, Starlette and the workers' connections."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("websockets.asyncio.client")

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from scalellm_plugins.frontends import counting, sessions
from scalellm_plugins.frontends.accounting import Accounting
from scalellm_plugins.frontends.admission import SERVER, Admission
from scalellm_plugins.frontends.connection import FastLaneProtocol
from scalellm_plugins.frontends.gate import Gate
from scalellm_plugins.frontends.headers import CrossOrigin
from scalellm_plugins.frontends.limits import Limits, Refusal
from scalellm_plugins.frontends.tenants import TenantFile

PATH = "/v1/realtime"
NOTHING = [0, 0, 0, 0]


class Stand:
    """Server and gate; the application brings a prompt of as many tokens as it is told."""

    def __init__(self, path: str | None, limits: Limits) -> None:
        async def session(socket: WebSocket) -> None:
            await socket.accept()
            async for text in socket.iter_text():
                if text == "fail":
                    raise RuntimeError("as if vLLM had")
                # As vLLM: the engine's work is a task's of the session.
                await socket.send_text(await asyncio.create_task(self.prompt(int(text))))

        async def other(_request: Any) -> JSONResponse:
            return JSONResponse(counting.current.get() is None)

        routes = [WebSocketRoute(path, session) for path in (PATH, "/else")]
        self.app = Starlette(routes=[*routes, Route("/health", other)])
        self.gate = Gate(
            Admission.private(),
            TenantFile(path),
            limits,
            Accounting(self.app),
            CrossOrigin(self.app),
        )
        sessions.install(self.app, self.gate)
        self.app.state.scalellm_gate = self.gate
        config = uvicorn.Config(
            self.app, port=0, http=FastLaneProtocol, log_level="critical", lifespan="off"
        )
        self.server = uvicorn.Server(config)

    async def prompt(self, tokens: int) -> str:
        ticket = counting.current.get()
        if ticket is None:
            return "not counted"
        made = ticket.count(tokens, running=True)
        if isinstance(made, Refusal):
            return made.message(1)
        waiting = self.used()
        made.first()
        running = self.used()
        made.done()
        return json.dumps([ticket.bound and ticket.bound.extra, waiting, running])

    def used(self) -> list[int]:
        return self.gate.counters.used(SERVER)

    def connect(self, key: str | None = None, path: str = PATH) -> Any:
        port = self.server.servers[0].sockets[0].getsockname()[1]
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return connect(f"ws://127.0.0.1:{port}{path}", additional_headers=headers, proxy=None)

    async def until(self, condition: Callable[[], bool]) -> None:
        async def poll() -> None:
            while not condition():
                await asyncio.sleep(0.005)

        await asyncio.wait_for(poll(), 30)


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Make a stand with limits and tenants (each with the key "NAME-key")."""
    made: list[tuple[Stand, asyncio.Task[None]]] = []

    async def make(*tenants: dict[str, Any], **limits: Any) -> Stand:
        path = None
        if tenants:
            entries = [
                {"keys": [hashlib.sha256(f"{t['name']}-key".encode()).hexdigest()], **t}
                for t in tenants
            ]
            path = str(tmp_path / "tenants.json")
            Path(path).write_text(json.dumps(entries))
        here = Stand(path, Limits(**limits))
        made.append((here, asyncio.create_task(here.server.serve())))
        await here.until(lambda: here.server.started)
        return here

    yield make
    for here, task in made:
        here.server.should_exit = here.server.force_exit = True
        await asyncio.wait_for(task, 30)


async def test_a_session_is_a_request_in_flight_until_it_ends(stand: Any) -> None:
    here = await stand(max_requests=1)
    async with here.connect() as first:
        assert here.used() == [1, 0, 0, 0], "in flight, and not queued"
        with pytest.raises(InvalidStatus) as refused:
            await here.connect()
        response = refused.value.response
        assert response.status_code == 503
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert "--scalellm.frontend.max_requests" in json.loads(response.body)["error"]["message"]
        await first.send("1")
        await first.recv()
        assert here.used() == [1, 0, 0, 0], "between prompts"
    await here.until(lambda: here.used() == NOTHING)
    async with here.connect():
        assert here.used()[0] == 1


@pytest.mark.parametrize("how", ["abort", "fail"])
async def test_a_session_that_breaks_gives_its_room_back(stand: Any, how: str) -> None:
    here = await stand(max_requests=1)
    session = await here.connect()
    if how == "abort":
        session.transport.abort()
    else:
        await session.send("fail")
        with pytest.raises(ConnectionClosed):
            await session.recv()
    await here.until(lambda: here.used() == NOTHING)


async def test_a_sessions_prompts_are_counted_for_its_tenant(stand: Any) -> None:
    here = await stand({"name": "acme", "max_requests": 1, "max_prompt_tokens": 100})
    async with here.connect("acme-key") as session:
        await session.send("60")
        extra, waiting, running = json.loads(await session.recv())
        assert extra == {"scalellm_tenant": "acme", "scalellm_weight": 1.0}
        assert waiting == [1, 0, 60, 60]
        assert running == [1, 0, 60, 0]
        with pytest.raises(InvalidStatus) as refused:
            await here.connect("acme-key")
        assert refused.value.response.status_code == 429
        assert "'acme'" in refused.value.response.body.decode()
    await here.until(lambda: here.used() == NOTHING)


async def test_a_prompt_without_room_is_refused_and_the_session_goes_on(stand: Any) -> None:
    here = await stand(max_queued_prompt_tokens=100)
    other = here.gate.enter(here.gate.tenants.book.default, None)
    held = other.count(90)
    async with here.connect() as session:
        await session.send("20")
        assert "max_queued_prompt_tokens" in await session.recv()
        held.first()
        await session.send("20")
        assert json.loads(await session.recv())[1] == [2, 0, 110, 20]
    other.leave()
    await here.until(lambda: here.used() == NOTHING)


async def test_who_has_no_key_and_what_brings_no_work_is_not_counted(stand: Any) -> None:
    """vLLM's own middleware refuses the one; there is none here."""
    here = await stand({"name": "acme"}, max_requests=1)
    for key, path in ((None, PATH), ("wrong", PATH), ("acme-key", "/else")):
        async with here.connect(key, path) as session:
            assert here.used() == NOTHING
            await session.send("5")
            assert await session.recv() == "not counted"
    port = here.server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert (await reader.read()).endswith(b"true")
    writer.close()


def test_an_application_without_sessions_is_left_alone() -> None:
    app = Starlette()
    sessions.install(app, None)  # type: ignore[arg-type]
    assert app.user_middleware == []
