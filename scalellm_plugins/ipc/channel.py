"""Both directions between two processes: messages of one or more frames, of any size.

A message is a record of the ring, or, where it is large, a memory segment of its own whose
descriptor crosses the peers' socket while its record keeps its place in the order. The reader maps
it: nothing is copied, and it lives as long as somebody holds a view of it.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from scalellm_plugins.errors import ScaleLLMError

from . import memory, peers, ring

SEGMENT = 0x8000
"""Flag of a record's kind: the payload is the size (u64) of the segment that holds the message."""

MOST_SEGMENTS = 64
"""Segments under way at a time: their descriptors wait in a socket's queue."""

_ALIGNMENT = 64
_SIZE = struct.Struct("<Q")

Buffer = Any
"""bytes, bytearray, memoryview, array: anything with the buffer protocol, contiguous."""


class MessageCorrupted(ScaleLLMError):
    """A message's frames do not fit into it."""


class Message(NamedTuple):
    """What came. `data` is valid until the next `release` if `borrowed`, else as long as held."""

    kind: int
    data: memoryview
    borrowed: bool


class Channel:
    """One end of a connection to a peer. Not thread-safe, except that one thread may send while
    another receives.
    """

    def __init__(self, peer: peers.Peer) -> None:
        self.peer = peer
        self.dead = False
        """Set by whoever watches `peer.pidfd`."""
        wake = ring.signal(peer.wake)
        sending, receiving = (
            memory.attach(fd, ring.size_of(size))
            for fd, size in zip((peer.sending, peer.receiving), peer.sizes, strict=True)
        )
        self.producer = ring.Producer(sending, wake)
        self.consumer = ring.Consumer(receiving, wake)
        self.large = self.producer.capacity // 8
        """Messages of more bytes go in segments."""
        self._backlog: deque[tuple[int, list[Buffer]]] = deque()
        self._segments: deque[int] = deque()

    @property
    def backlog(self) -> int:
        """Messages that wait for room."""
        return len(self._backlog)

    def put(self, kind: int, frames: Sequence[Buffer]) -> None:
        """Send a message, now or, in its turn, when there is room (`flush`). Never blocks."""
        if self._backlog or not self.send(kind, frames):
            self._backlog.append((kind, list(frames)))

    def flush(self) -> bool:
        """Send what waits for room; whether nothing waits any more."""
        while self._backlog:
            if not self.send(*self._backlog[0]):
                return False
            self._backlog.popleft()
        return True

    def send(self, kind: int, frames: Sequence[Buffer]) -> bool:
        """Send a message; False when there is no room, and the peer will wake this end.

        Raises:
            OSError: no memory or descriptor for a segment.
        """
        sizes = [memoryview(frame).nbytes for frame in frames]
        total, places = _layout(sizes)
        if total > self.large:
            return self._send_segment(kind, frames, sizes, total, places)
        view = self.producer.reserve(total)
        if view is None:
            return False
        _fill(view, frames, sizes, places)
        self.producer.publish(kind)
        return True

    def _send_segment(
        self, kind: int, frames: Sequence[Buffer], sizes: list[int], total: int, places: list[int]
    ) -> bool:
        if self._segments:
            released = self.producer.released
            while self._segments and self._segments[0] <= released:
                self._segments.popleft()
            if len(self._segments) >= MOST_SEGMENTS:
                self.producer.ask_for_room()
                if self._segments[0] > self.producer.released:
                    return False
        view = self.producer.reserve(_SIZE.size)
        if view is None:
            return False
        fd = memory.create(total, "scalellm-segment")
        try:
            with mmap.mmap(fd, total) as mapped, memoryview(mapped) as whole:
                _fill(whole, frames, sizes, places)
            socket.send_fds(self.peer.socket, [b"\0"], [fd])
        except BlockingIOError:
            self.producer.ask_for_room()
            return False
        except (BrokenPipeError, ConnectionResetError):
            return True  # nobody is there to read it
        finally:
            os.close(fd)
        _SIZE.pack_into(view, 0, total)
        self.producer.publish(kind | SEGMENT)
        self._segments.append(self.producer.position)
        return True

    def receive(self) -> Message | None:
        """Return the next message, or None when there is none.

        Raises:
            RingCorrupted: the ring is unusable.
            MessageCorrupted: a segment is not what its record says.
        """
        record = self.consumer.read()
        if record is None:
            return None
        if not record.kind & SEGMENT:
            return Message(record.kind, record.data, True)
        kind = record.kind & ~SEGMENT
        try:
            (size,) = _SIZE.unpack(record.data)
            _, fds, _, _ = socket.recv_fds(self.peer.socket, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except (struct.error, OSError) as error:
            raise MessageCorrupted(f"segment of message kind {kind}: {error}") from None
        if len(fds) != 1:
            raise MessageCorrupted(f"segment of message kind {kind}: no descriptor came with it")
        try:
            mapped = memory.attach(fds[0], size)
        except memory.SegmentError as error:
            raise MessageCorrupted(f"segment of message kind {kind}: {error}") from None
        finally:
            os.close(fds[0])
        return Message(kind, memoryview(mapped), False)

    def release(self) -> None:
        """Give back the ring's memory of all messages received."""
        self.consumer.release()

    def close(self) -> None:
        """Let go of everything; the peer notices by this end's socket or process."""
        self._backlog.clear()
        self.producer.close()
        self.consumer.close()
        self.peer.close()


def frames_of(message: Message) -> list[memoryview]:
    """Return the frames of a message, as views of it.

    Raises:
        MessageCorrupted: they do not fit into it.
    """
    data = message.data
    try:
        (count,) = _SIZE.unpack_from(data, 0)
        if count > len(data) // 8:
            raise MessageCorrupted(f"message of {len(data)} bytes says {count} frames")
        sizes = [_SIZE.unpack_from(data, 8 + 8 * number)[0] for number in range(count)]
    except struct.error as error:
        raise MessageCorrupted(f"message of {len(data)} bytes: {error}") from None
    total, places = _layout(sizes)
    if total > len(data):
        raise MessageCorrupted(f"message of {len(data)} bytes says it has {total}: {sizes[:8]}")
    return [data[place : place + size] for place, size in zip(places, sizes, strict=True)]


def _layout(sizes: Iterable[int]) -> tuple[int, list[int]]:
    """Bytes of a message and where its frames begin: number of frames, sizes, frames."""
    sizes = list(sizes)
    end = 8 + 8 * len(sizes)
    places = []
    for number, size in enumerate(sizes):
        if number:
            end = end + _ALIGNMENT - 1 & -_ALIGNMENT
        places.append(end)
        end += size
    return end, places


def _fill(view: memoryview, frames: Sequence[Buffer], sizes: list[int], places: list[int]) -> None:
    struct.pack_into(f"<{1 + len(sizes)}Q", view, 0, len(sizes), *sizes)
    for frame, size, place in zip(frames, sizes, places, strict=True):
        if size:
            view[place : place + size] = memoryview(frame).cast("B")
