"""Websockets at the gate: a session is a request in flight, from its handshake to its end.

The task that serves it carries its pass, so its prompts are counted like any request's
(counting.py); of one that grows while it is answered, what it had at its first token. It is not
among the queued requests: what it waits for most of the time is its client.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from . import authentication, counting
from .limits import Refusal

if TYPE_CHECKING:
    from .gate import Gate

SESSIONS = frozenset({"/v1/realtime"})
"""Paths of websockets that bring the engine prompts, in any supported release of vLLM."""


class SessionGate:
    """The middleware, around all others: who has no right key is left to vLLM's own."""

    def __init__(self, app: Any, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        """See ASGI."""
        if scope["type"] == "websocket":
            path = scope["path"].removeprefix(scope.get("root_path") or "")
            if path in SESSIONS:
                return self._session(scope, receive, send)
        served: Awaitable[None] = self._app(scope, receive, send)
        return served

    async def _session(self, scope: Any, receive: Any, send: Any) -> None:
        gate = self._gate
        tenant = gate.tenants.book.of(authentication.shown(scope))
        if tenant is None:
            await self._app(scope, receive, send)
            return
        admitted = gate.enter(tenant, None)
        if isinstance(admitted, Refusal):
            from starlette.responses import Response

            seconds = gate.retry_after(gate.counters.index(tenant.name), admitted)
            headers = {"content-type": "application/json", "retry-after": str(seconds)}
            refused = Response(admitted.body(seconds), admitted.status, headers)
            await refused(scope, receive, send)  # in place of the handshake's 101
            return
        admitted.first()
        counting.current.set(admitted)
        try:
            await self._app(scope, receive, send)
        finally:
            admitted.leave()


def install(app: Any, gate: Gate) -> None:
    """Guard an application's websockets, if it has any that matter, before it serves."""
    from starlette.middleware import Middleware
    from starlette.routing import WebSocketRoute

    paths = {route.path for route in app.routes if isinstance(route, WebSocketRoute)}
    if not paths & SESSIONS:
        return
    app.user_middleware.insert(0, Middleware(SessionGate, gate=gate))
    if app.middleware_stack is not None:  # see authentication.py
        app.middleware_stack = app.build_middleware_stack()
