"""One HTTP connection: uvicorn's, with the fast lane asked first.

uvicorn parses the request and keeps the connection's state as ever. Only the moment at which the
ASGI application would start is changed: a POST to one of the lane's routes waits for its body, and
if the lane takes it, no application, task or message is involved. If not, the application starts
then, with the same bytes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from . import ways

if TYPE_CHECKING:
    from .answers import Answer
    from .gate import Gate, Pass
    from .lane import Lane


class FastLaneProtocol(HttpToolsProtocol):
    """uvicorn's protocol for `uvicorn.Config(http=...)`. Without a lane it is exactly its base."""

    # Of its base, instances have a dictionary: what every token needs is found without it.
    __slots__ = ("_fd", "_held", "_to", "admitted", "answer", "gate", "lane")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        state = getattr(self.config.app, "state", None)
        self.lane: Lane | None = getattr(state, "scalellm_lane", None)
        self.gate: Gate | None = getattr(state, "scalellm_gate", None)
        self.admitted: Pass | None = None
        """Of the request that is served; set by the gate."""
        self._held: tuple[Any, Any] | None = None
        """(cycle, application) of a request whose body is not complete yet."""
        self._fd = -1
        self.answer: Answer | None = None
        """The lane's request that this connection is waiting for."""

    def connection_made(self, transport: Any) -> None:
        """Note the socket, where bytes written to it are what the client reads."""
        super().connection_made(transport)
        self._to = transport
        sock = transport.get_extra_info("socket")
        if sock is not None and transport.get_extra_info("sslcontext") is None:
            self._fd = sock.fileno()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        # Called when the headers are complete, or, for a pipelined request, when it is its turn.
        for_lane = app is self.app  # and not uvicorn's own, which says that it has no room
        if for_lane and self.gate is not None:
            if not self.gate.admit(self, cycle):
                return
            for_lane = self.admitted is not None  # else nothing to count, or no right key
        if not for_lane or self.lane is None or not self.lane.may_take(cycle):
            if self.lane is not None and cycle.scope["path"].startswith("/metrics"):
                self.lane.catch_up()
            self._start_application(cycle, app)
        elif cycle.more_body:
            self._held = (cycle, app)
        else:
            self._offer(cycle, app)

    def _start_application(self, cycle: Any, app: Any) -> None:
        if app is self.app:
            if cycle.scope["method"] == "POST":
                app = ways.carried(app)
            if self.admitted is not None:
                app = self.admitted.carried(app)
        if self.lane is not None and self.lane.accounting.own_log and cycle.access_log:
            cycle.access_log = False  # one line for a request, at its end
            app = self.lane.accounting.logged(app)
        super()._start_asgi_task(cycle, app)

    def _offer(self, cycle: Any, app: Any) -> None:
        assert self.lane is not None
        if not self.lane.take(self, cycle):
            self.pass_on(cycle, app)

    def pass_on(self, cycle: Any, app: Any = None) -> None:
        """Leave a request whose body is complete to vLLM's own application."""
        self.answer = None
        if not cycle.disconnected:
            self._start_application(cycle, app or self.app)

    def on_body(self, body: bytes) -> None:
        """Collect the body; for the lane, without asking the client to pause."""
        if self._held is not None and self._held[0] is self.cycle:
            self.cycle.body += body
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Offer a complete request to the lane."""
        super().on_message_complete()
        if self._held is not None and self._held[0] is self.cycle:
            (cycle, app), self._held = self._held, None
            self._offer(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """Abort the request of a client that went away, at once."""
        answer, self.answer, self._held = self.answer, None, None
        super().connection_lost(exc)
        if answer is not None:
            answer.cycle.disconnected = True
            answer.gone()
        if self.admitted is not None and not self.admitted.in_application:
            self.admitted.leave()

    def write(self, data: bytes) -> None:
        """Write a part of the lane's answer.

        Straight to the socket where nothing is queued before it: uvloop would queue it, and look at
        the queue at the end of the turn (6.2-6.7 instead of 7.3-8.4 µs per event of 230 bytes,
        including the kernel's part; two EPYC cores). What the socket does not take, and everything
        under TLS, is the transport's.
        """
        transport = self._to
        if self._fd >= 0 and not transport.get_write_buffer_size() and not transport.is_closing():
            try:
                sent = os.write(self._fd, data)
            except OSError:  # full, or gone: the transport finds out which
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
        transport.write(data)

    def pause_writing(self) -> None:
        """The write buffer is full: tokens wait and become one larger event."""
        super().pause_writing()
        if self.answer is not None:
            self.answer.paused = True

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        if self.answer is not None:
            self.answer.paused = False
            self.answer.flush()

    def finish(self, cycle: Any) -> None:
        """End the exchange after the last byte was written, as uvicorn does."""
        self.answer = None
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
