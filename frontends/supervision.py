"""What supervisor and worker tell each other, over one socket pair per worker.

Sequenced packets: one packet is one message, and the end of the other process is the end of the
stream. Messages are rare (a handful in a worker's life); what changes all the time is in slots.py.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    """Worker: the engines answered. `payloads`: ZMQ identity → what it said when it was ready."""

    payloads: list[tuple[bytes, bytes]]


class Serving(msgspec.Struct, frozen=True, tag=True):
    """Worker: it accepts connections. `modules` it imported that the supervisor had not."""

    modules: list[str]


class EngineDead(msgspec.Struct, frozen=True, tag=True):
    """Worker: the engine is gone, and so the worker will be."""


class Leaving(msgspec.Struct, frozen=True, tag=True):
    """Worker: it was told to end, and accepts no more connections."""


class Retire(msgspec.Struct, frozen=True, tag=True):
    """Supervisor: accept no more, finish what is open, leave."""


class AbortClient(msgspec.Struct, frozen=True, tag=True):
    """Supervisor: have the engine abort the requests of the worker that died in slot `index`."""

    index: int


FromWorker = EngineReady | Serving | EngineDead | Leaving
FromSupervisor = Retire | AbortClient
Message = FromWorker | FromSupervisor

_PACKET = 1 << 17
"""Largest message: below the kernel's default send buffer, which bounds a packet."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class Channel:
    """One end of the pair; never blocks."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self.closed = False
        """Whether the other process has gone (or closed its end)."""

    @staticmethod
    def pair() -> tuple[Channel, Channel]:
        """Return two connected ends; each process closes the one that is not its own."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return Channel(one), Channel(other)

    def fileno(self) -> int:
        """For selectors and event loops."""
        return self._end.fileno()

    def send(self, message: Message) -> None:
        """Send, unless the other process has gone (noticed elsewhere) or has stopped reading."""
        data = _encoder.encode(message)
        assert len(data) <= _PACKET, f"{type(message).__name__} of {len(data)} bytes"
        try:
            self._end.send(data)
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self.closed = True

    def receive(self) -> Iterator[Message]:
        """Yield what has arrived; sets `closed` when the other process has gone."""
        while not self.closed:
            try:
                data = self._end.recv(_PACKET)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if data:
                yield _decoder.decode(data)
            else:
                self.closed = True

    def close(self) -> None:
        """Close this end."""
        self._end.close()
