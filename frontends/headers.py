"""Headers of the fast lane: what a request may carry, and what an answer starts with.

A header that only vLLM's own middlewares understand (CORS, ranks, load reports …) sends a request
to them. A wrong key does so too: then vLLM itself says so.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.middleware.cors import CORSMiddleware
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from scalellm_plugins.errors import TermError
from scalellm_plugins.scheduling import terms

from .routes import Asked

if TYPE_CHECKING:
    from .answers import Answer

_DECLINED = frozenset({b"x-data-parallel-rank", b"endpoint-load-metrics-format", b"upgrade"})
"""A rank chosen by a router; ORCA load reports; WebSockets: vLLM's own code answers."""

_ORIGINS = 256


class CrossOrigin:
    """Headers that the server's own CORS middleware adds, asked from it once per origin."""

    def __init__(self, app: Any) -> None:
        kinds = [one for one in app.user_middleware if one.cls is CORSMiddleware]
        self._middlewares = [one.cls(_answer, *one.args, **one.kwargs) for one in kinds]
        self._known: dict[bytes | None, bytes] = {}

    def lines(self, origin: bytes | None) -> bytes:
        """Return header lines for a request from `origin`."""
        known = self._known.get(origin)
        if known is None:
            if len(self._known) >= _ORIGINS:
                self._known.clear()
            self._known[origin] = known = b"".join(map(self._ask, self._middlewares, [origin]))
        return known

    @staticmethod
    def _ask(middleware: Any, origin: bytes | None) -> bytes:
        headers = [] if origin is None else [(b"origin", origin)]
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "headers": headers}
        with suppress(StopIteration):
            middleware(scope, None, send).send(None)
        return b"".join(b"%b: %b\r\n" % pair for pair in sent[0]["headers"])


async def _answer(_scope: Any, _receive: Any, send: Any) -> None:
    """An application whose answers have no headers of their own."""
    await send({"type": "http.response.start", "status": 200, "headers": []})


class HeaderReader:
    """Made once per server from vLLM's arguments."""

    def __init__(
        self, app: Any, args: Namespace, model_names: Iterable[str], api_keys: Iterable[str]
    ) -> None:
        self._cross_origin = CrossOrigin(app)
        self.model_names = frozenset(model_names)
        self._keys = [hashlib.sha256(key.encode()).digest() for key in api_keys if key]
        self._echo_id = bool(args.enable_request_id_headers)
        self._defaults: list[tuple[bytes, bytes]] = []
        self._default_lines = b""
        self._closing = False

    def serves(self, model: str | None) -> bool:
        """Whether a request's model is the base model (adapters are vLLM's own business)."""
        return not model or model in self.model_names

    def read(self, headers: list[tuple[bytes, bytes]]) -> Asked | None:
        """Take out what the lane needs; None when the request is not for it."""
        is_json = has_terms = False
        key = request_id = session = origin = None
        priority: int | None = None
        for name, value in headers:
            if name in _DECLINED:
                return None
            if name == b"content-type":
                is_json = value.partition(b";")[0].lower() == b"application/json"
            elif name == b"origin":
                origin = value
            elif name == b"authorization":
                key = value if key is None else key
            elif name == b"x-request-id":
                request_id = value.decode("latin-1") if request_id is None else request_id
            elif name == b"x-session-id":
                session = value.decode("latin-1") if session is None else session
            elif name == b"x-vllm-priority" and priority is None:
                with suppress(ValueError):
                    priority = int(value.decode("latin-1"))
            elif name.startswith(terms.HEADER_PREFIX):
                has_terms = True
        if not is_json or not self._may(key):
            return None
        try:
            said = terms.in_headers(headers) if has_terms else None
        except TermError:
            return None
        return Asked(request_id, priority, session, origin, said)

    def _may(self, authorization: bytes | None) -> bool:
        if not self._keys:
            return True
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key.decode("latin-1").encode()).digest()
        # Every key is compared, so that the time says nothing about which one was right.
        return sum(secrets.compare_digest(digest, known) for known in self._keys) > 0

    def answer(self, answer: Answer, status: int, content_type: bytes, body: bytes | None) -> bytes:
        """Return status line and headers; chunked where the length is not known."""
        lines = [STATUS_LINE[status], self._server_lines(answer.connection)]
        if body is not None:
            lines.append(b"content-length: %d\r\n" % len(body))
        lines.append(b"content-type: %b\r\n" % content_type)
        lines.append(self._cross_origin.lines(answer.ask.origin))
        lines += answer.extra_headers
        if self._echo_id:
            given = dict(reversed(answer.cycle.scope["headers"])).get(b"x-request-id")
            lines.append(b"x-request-id: %b\r\n" % (given or uuid.uuid4().hex.encode()))
        if self._closing:
            answer.cycle.keep_alive = False
        elif not answer.cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        if body is None:
            lines.append(b"transfer-encoding: chunked\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)

    def _server_lines(self, connection: Any) -> bytes:
        """uvicorn's own headers (date, server); it makes a new list once per second."""
        defaults = connection.server_state.default_headers
        if defaults is not self._defaults:
            self._defaults = defaults
            # A server that retires says so to every client; the connection is then ours to close.
            self._closing = (b"connection", b"close") in defaults
            self._default_lines = b"".join(b"%b: %b\r\n" % pair for pair in defaults)
        return self._default_lines
