"""A byte-exact HTTP client for the differential suite, over raw sockets.

It sends the bytes it is given and keeps what a library would hide: interim responses, the reason
phrase, the framing of a body, and whether the connection outlives the exchange.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BufferedReader
from typing import Self

TIMEOUT_S = 60.0
"""Of one socket operation. It is reached only by a server that will never answer."""

AUTHORITY = "demo.test"
"""The Host of every request, so that both servers are sent, and can echo, the same bytes."""

_PROBE = f"GET /health HTTP/1.1\r\nhost: {AUTHORITY}\r\n\r\n".encode()


class NoResponse(ConnectionError):
    """The server closed the connection instead of sending a (whole) response."""


class Idle(NoResponse):
    """It did so before it sent a byte, as it may between two requests."""


class Malformed(ConnectionError):
    """What came is no HTTP response."""


@dataclass(frozen=True)
class Response:
    """One HTTP response as it came over the wire.

    `framing` says how the body's end was marked: "length", "chunked", "close" or "none";
    `interim` holds the statuses of the 1xx responses before it.
    """

    version: str
    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    framing: str
    interim: tuple[int, ...] = ()

    def header(self, name: str) -> str | None:
        """The first header of that (lower-case) name."""
        return next((value for key, value in self.headers if key == name), None)


@dataclass(frozen=True)
class Exchange:
    """What one shape got: its responses, and what became of the connection afterwards.

    `connection` is "open" (it answered a request for /health), "answers STATUS" (in another way),
    "closed", or "shared" where nobody asked because the connection goes on to the next shape.
    Of a server that breaks HTTP, it says how.
    """

    responses: tuple[Response, ...]
    connection: str


def _read_line(stream: BufferedReader) -> str:
    line = stream.readline(1 << 20)
    if not line.endswith(b"\n"):
        raise NoResponse(f"connection closed within a response's head: {line!r}")
    return line.decode("latin-1").rstrip("\r\n")


def _read_exactly(stream: BufferedReader, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise NoResponse(f"connection closed after {len(data)} of {size} bytes of a body")
    return data


def _number(text: str, base: int = 10) -> int:
    try:
        return int(text, base)
    except ValueError:
        raise Malformed(f"{text!r} where a number belongs") from None


def _read_chunks(stream: BufferedReader) -> bytes:
    body = bytearray()
    while size := _number(_read_line(stream).partition(";")[0], 16):
        body += _read_exactly(stream, size)
        if line := _read_line(stream):
            raise Malformed(f"after a chunk of {size} bytes comes {line!r}")
    while _read_line(stream):  # trailers
        pass
    return bytes(body)


def _read_head(stream: BufferedReader) -> tuple[str, int, str, tuple[tuple[str, str], ...]]:
    if not stream.peek(1):
        raise Idle("connection closed")
    line = _read_line(stream)
    version, _, rest = line.partition(" ")
    if not version.startswith("HTTP/"):
        raise Malformed(f"{line!r} where a response begins")
    code, _, reason = rest.partition(" ")
    headers = []
    while line := _read_line(stream):
        name, _, value = line.partition(":")
        headers.append((name.strip().lower(), value.strip()))
    return version, _number(code), reason, tuple(headers)


def _read_response(stream: BufferedReader, method: str, stop_at_interim: bool = False) -> Response:
    """Read one final response, or the next 1xx if `stop_at_interim`."""
    interim: list[int] = []
    while True:
        version, status, reason, headers = _read_head(stream)
        if status >= 200 or stop_at_interim:
            break
        interim.append(status)
    fields = dict(headers)
    if method == "HEAD" or status < 200 or status in (204, 304):
        body, framing = b"", "none"
    elif "chunked" in fields.get("transfer-encoding", ""):
        body, framing = _read_chunks(stream), "chunked"
    elif "content-length" in fields:
        body, framing = _read_exactly(stream, _number(fields["content-length"])), "length"
    else:
        body, framing = stream.read(), "close"
    return Response(version, status, reason, headers, body, framing, tuple(interim))


class _Connection:
    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream: BufferedReader = self._socket.makefile("rb")

    def send(self, data: bytes) -> None:
        # A server may answer and close before it has read everything; its answer still counts.
        with suppress(ConnectionError):
            self._socket.sendall(data)

    def stray(self) -> bytes:
        """Bytes that have come though nobody asked for any."""
        self._socket.settimeout(0)
        try:
            return self.stream.peek(1)
        except ConnectionError:
            return b""
        finally:
            self._socket.settimeout(TIMEOUT_S)

    def close(self) -> None:
        self.stream.close()
        self._socket.close()


class Client:
    """Sends shapes to one server: ordinary ones over one keep-alive connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._shared: _Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._drop()

    def _drop(self) -> None:
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def request(self, data: bytes, method: str) -> Exchange:
        """Send one request over the shared connection.

        A connection used before, on which now nothing comes back, is renewed: an idle one may be
        closed by its server at any moment.
        """
        state = "shared"
        if self._shared is not None and (stray := self._shared.stray()):
            state = f"shared, after the previous response came {stray!r}"
            self._drop()
        while True:
            reused = self._shared is not None
            connection = self._shared = self._shared or _Connection(self._port)
            connection.send(data)
            try:
                response = _read_response(connection.stream, method)
            except TimeoutError:
                self._drop()  # its late answer must not be the next request's
                raise
            except ConnectionError as error:
                self._drop()
                if reused and isinstance(error, Idle | ConnectionResetError):
                    continue
                return Exchange((), f"{state}, {error!r}")
            if response.framing == "close" or response.header("connection") == "close":
                self._drop()
            return Exchange((response,), state)

    def talk(self, phases: tuple[bytes, ...], methods: tuple[str, ...]) -> Exchange:
        """Send `phases` over a connection of their own and read a response per method.

        Before each phase but the first, one response is awaited (an interim one counts and is
        noted; after a final one nothing more is sent). Fewer responses come back than methods
        if the server closed the connection.
        """
        connection = _Connection(self._port)
        responses: list[Response] = []
        interim: tuple[int, ...] = ()
        broken = ""
        try:
            connection.send(phases[0])
            try:
                for phase in phases[1:]:
                    response = _read_response(connection.stream, methods[0], stop_at_interim=True)
                    if response.status >= 200:
                        responses.append(response)
                        break
                    interim += (response.status,)
                    connection.send(phase)
                for method in methods[len(responses) :]:
                    responses.append(_read_response(connection.stream, method))
            except Malformed as error:
                broken = f"{error!r}, "
            except ConnectionError:
                pass  # the missing response says it
            state = broken + self._state(connection)
        finally:
            connection.close()
        if interim and responses:
            first = responses[0]
            responses[0] = replace(first, interim=interim + first.interim)
        return Exchange(tuple(responses), state)

    def _state(self, connection: _Connection) -> str:
        """Ask for /health: only a connection in good order answers that with 200."""
        connection.send(_PROBE)
        try:
            status = _read_response(connection.stream, "GET").status
        except Malformed as error:
            return repr(error)
        except ConnectionError:
            return "closed"
        return "open" if status == 200 else f"answers {status}"
