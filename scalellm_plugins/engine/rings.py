"""The engine's end of the shared-memory connections: frontends come and go while it runs.

A thread waits for frontends to connect and for their ends (pidfd); everything else happens in the
engine's main loop (`inbox.py`, `outbox.py`). vLLM's sockets stay: for the handshake, for frontends
that do not connect here, for the data-parallel coordinator and for the engine's last word.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from scalellm_plugins.errors import ScaleLLMError
from scalellm_plugins.ipc import peers
from scalellm_plugins.ipc.channel import BESIDE_BYTES, Channel

from .inbox import Inbox
from .outbox import Frontend, Outbox

logger = logging.getLogger("vllm.scalellm")


class Rings:
    """One engine's. `addresses`: of its frontends' output sockets, by client index."""

    def __init__(self, engine: Any, addresses: Sequence[str]) -> None:
        self._engine = engine
        self._index = int(engine.engine_index)
        self._poll = select.epoll()
        self._actions: dict[int, Callable[[], None]] = {}
        self._listeners: list[socket.socket] = []
        self._running = True
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._addresses = list(addresses)
        from vllm.v1.serial_utils import MsgpackEncoder

        self._encoder = MsgpackEncoder
        self.outbox = Outbox(engine.output_queue)
        self.inbox = Inbox(engine, engine.input_queue, self.outbox)

    def install(self) -> None:
        """Take the place of the engine's queues and let frontends connect.

        Before the main loop runs, and before any frontend hears that the engine is ready.
        """
        for client_index, address in enumerate(self._addresses):
            listener = peers.listen(address, self._index)
            self._listeners.append(listener)
            accept = partial(self._accept, listener, client_index)
            self._on(listener.fileno(), select.EPOLLIN, accept)
        self._engine.output_queue = self.outbox
        self._engine.input_queue = self.inbox
        self._engine.scheduler.sends_columns = True  # the lean step's; vLLM's does not look
        self._on(self._end, select.EPOLLIN, self._finish)
        self._thread = threading.Thread(target=self._watch, name="scalellm-ipc", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let nobody connect any more. Who is connected stays so until the process ends."""
        os.eventfd_write(self._end, 1)
        self._thread.join()

    def _finish(self) -> None:
        self._running = False
        for listener in self._listeners:
            listener.close()
        self._poll.close()
        os.close(self._end)

    def _on(self, fd: int, events: int, action: Callable[[], None]) -> None:
        self._actions[fd] = action
        self._poll.register(fd, events)

    def _watch(self) -> None:
        while self._running:
            for fd, _ in self._poll.poll():
                action = self._actions.get(fd)  # None: gone with an event before it
                try:
                    if action is not None:
                        action()
                except (ScaleLLMError, OSError, ValueError) as error:
                    logger.warning("shared-memory connection: %s", error)

    def _accept(self, listener: socket.socket, client_index: int) -> None:
        peer = peers.accept(listener, client_index, self._index)
        frontend = Frontend(Channel(peer, BESIDE_BYTES), self._index, self._encoder().encode)
        gone = partial(self._gone, frontend)
        self._on(peer.pidfd, select.EPOLLIN, gone)
        # Its process may live on without it. Segments' descriptors come this way, too: no EPOLLIN.
        self._on(peer.socket.fileno(), select.EPOLLRDHUP, gone)
        self.inbox.connect(client_index, frontend)
        self.outbox.connect(client_index, frontend)
        peers.welcome(peer, self._index, self.inbox.wake_fd)

    def _gone(self, frontend: Frontend) -> None:
        """A frontend has ended or hung up: the main loop does the rest."""
        peer = frontend.channel.peer
        for fd in (peer.pidfd, peer.socket.fileno()):
            self._poll.unregister(fd)
            del self._actions[fd]
        frontend.channel.dead = True
        self.inbox.wake()
