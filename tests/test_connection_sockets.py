"""The workers' connections on real sockets, as uvloop makes them: TCP, TLS and Unix."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("cryptography")
pytest.importorskip("uvloop")

import uvicorn
import uvloop

from scalellm_plugins.frontends import connection as connection_module
from scalellm_plugins.frontends.connection import FastLaneProtocol

from .places import Certificate, Place

LIMIT_S = 60.0
PIECES = [os.urandom(size) for size in (1, 230, 70_000, 5, 3 << 20, 17, 1 << 20, 1)]
"""More than a socket takes: some leave at once, some wait, and later ones come behind them."""


class Lane:
    """Answers each request with all the pieces."""

    accounting = SimpleNamespace(own_log=False)

    def may_take(self, _cycle: Any) -> bool:
        return True

    def take(self, connection: Any, cycle: Any) -> bool:
        length = sum(map(len, PIECES))
        cycle.response_started = True
        connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % length)
        for piece in PIECES:
            connection.write(piece)
        connection.finish(cycle)
        return True

    def catch_up(self) -> None:
        pass


class Served(threading.Thread):
    """A server with the lane, at a place of each kind."""

    def __init__(self, kind: str, folder: Path) -> None:
        super().__init__(daemon=True)
        app = SimpleNamespace(state=SimpleNamespace(scalellm_lane=Lane()))
        options: dict[str, Any] = {}
        path = trusted = None
        if kind == "tls":
            certificate = Certificate.make(folder)
            trusted = certificate.cert
            options = {"ssl_certfile": trusted, "ssl_keyfile": certificate.key}
        if kind == "unix":
            path = folder / "socket"
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.bind(str(path))
        else:
            self.sock = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            http=FastLaneProtocol,
            lifespan="off",
            log_level="critical",
            **options,
        )
        self.server = uvicorn.Server(config)
        port = 0 if path else self.sock.getsockname()[1]
        self.place = Place(None, folder, port, path, trusted)  # type: ignore[arg-type]
        self.direct = 0
        """Bytes that went around the transport."""

    def run(self) -> None:
        uvloop.run(self.server.serve(sockets=[self.sock]))

    def write(self, descriptor: int, data: bytes) -> int:
        sent = os.write(descriptor, data)
        self.direct += sent
        return sent


@pytest.fixture(params=["tcp", "tls", "unix"])
def served(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    made = Served(request.param, tmp_path)
    counted = SimpleNamespace(write=made.write)
    monkeypatch.setattr(connection_module, "os", counted)
    made.start()
    deadline = time.monotonic() + LIMIT_S
    while not made.server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield made
    made.server.should_exit = made.server.force_exit = True
    made.join(LIMIT_S)


def read(client: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = client.recv(1 << 16)
        assert part, "the connection ended early"
        data += part
    assert len(data) == count, "more than was announced"
    return bytes(data)


def test_everything_arrives_in_order_however_it_left(served: Served) -> None:
    """TLS records cannot be written around: plain bytes among them end the connection."""
    client = served.place.socket()
    expected = hashlib.sha256(b"".join(PIECES)).digest()
    for _ in range(3):  # on one connection
        client.sendall(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        time.sleep(0.05)  # the buffers fill up meanwhile
        assert hashlib.sha256(read(client, sum(map(len, PIECES)))).digest() == expected
    is_tls = isinstance(client, ssl.SSLSocket)
    assert (served.direct == 0) == is_tls
    client.close()
