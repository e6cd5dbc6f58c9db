"""Answering a request whose body nobody has read, straight on its connection.

A small body is let in and thrown away, and the connection goes on. A large one is not worth the
wait: the answer says `connection: close`, and what the client still sends is dropped unparsed for a
while. (Closing at once would make the kernel reset the connection, and the client would lose the
answer that it has not read yet.)
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

SMALL = 65536
"""Bytes of a body that are let in: as many as uvicorn reads ahead."""

LINGER_S = 2.0
"""How long a client that still sends may take to notice that it is refused."""


def path_of(scope: Any) -> str:
    """Return a request's path as the application knows it."""
    path: str = scope["path"]
    root = scope.get("root_path")
    return path.removeprefix(root) if root else path


def is_anthropic(scope: Any) -> bool:
    """Whether errors look like Anthropic's on this route."""
    return path_of(scope) == "/v1/messages"


def unread(cycle: Any) -> int | None:
    """Return an upper bound of the bytes of the body that were not read yet; None: unknown."""
    if not cycle.more_body:
        return 0
    length: int | None = 0
    for name, value in cycle.scope["headers"]:
        if name == b"content-length":
            length = int(value)
        elif name == b"transfer-encoding":
            return None
    return length


def respond(connection: Any, cycle: Any, status: int, lines: bytes, body: bytes) -> None:
    """Answer with `status`, more header `lines` and a JSON `body`; then go on or hang up."""
    left = unread(cycle)
    small = left is not None and left <= SMALL
    # A client that waits for a "100 Continue" may or may not send its body after another answer.
    if (cycle.waiting_for_100_continue and left != 0) or not small:
        cycle.keep_alive = False
    cycle.response_started = True
    cycle.waiting_for_100_continue = False
    defaults = connection.server_state.default_headers
    connection.transport.write(
        b"%b%b%bcontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n%b"
        % (
            STATUS_LINE[status],
            b"".join(b"%b: %b\r\n" % pair for pair in defaults),
            lines,
            len(body),
            b"" if cycle.keep_alive else b"connection: close\r\n",
            body,
        )
    )
    if cycle.keep_alive or left == 0:
        connection.finish(cycle)
    else:
        cycle.response_complete = True
        cycle.message_event.set()
        cycle.on_response()
        _Lingering(connection)


class _Lingering(asyncio.Protocol):
    """What is left of a connection: it reads and drops, until the client has noticed."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._transport = connection.transport
        self._transport.set_protocol(self)
        if self._transport.can_write_eof():
            self._transport.write_eof()
        # A client that is slow to take even this little may have paused the reading.
        self._transport.resume_reading()
        self._timer = connection.loop.call_later(LINGER_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        """Drop it."""

    def eof_received(self) -> None:
        """The client has closed its side: the transport closes ours."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Let uvicorn know."""
        self._timer.cancel()
        self._connection.connection_lost(exc)
