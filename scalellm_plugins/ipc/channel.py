"""Both directions between two processes: messages of one or more frames, of any size.

A message is a record of the ring, or, where it is large, a memory segment of its own whose
descriptor crosses the peers' socket while its record keeps its place in the order. The reader maps
it: nothing is copied, and it lives as long as somebody holds a view of it.

Up to a few megabytes the pages of a new segment cost more than two copies (1 MB: 0.9 ms, ZMQ 0.4).
Such a message lies beside the ring, in memory that both sides keep mapped, until its record is
released; a second one meanwhile gets a segment.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from scalellm_plugins.errors import ScaleLLMError

from . import memory, peers, ring

SEGMENT = 0x8000
"""Flag of a record's kind: the payload is the size of the segment that holds the message, and the
number (u64 both) that its descriptor carries. A sender that was interrupted between passing the
descriptor and publishing the record leaves one that nobody asks for."""

BESIDE = 0x4000
"""Flag of a record's kind: the payload is the size of the message beside the ring, the number of
that memory's descriptor, which comes before its first message, and its size (u64 each)."""

MAX_KIND = BESIDE - 1
"""The ring's filler has every bit."""

BESIDE_BYTES = 4 << 20
"""Of the memory beside a ring, from the first message that goes there."""

MOST_SEGMENTS = 64
"""Segments under way at a time: their descriptors wait in a socket's queue."""

_ALIGNMENT = 64
"""Of frames but the first, in a segment; in a ring it is 8."""

_WORD = struct.Struct("<Q")
_PLACE = struct.Struct("<QQ")
_BESIDE_PLACE = struct.Struct("<QQQ")

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
    another receives. Owns the peer from the beginning.

    Args:
        peer: whom it connects to.
        beside: bytes of memory beside the ring, for messages from here that do not fit into it; 0:
            each has a segment.

    Raises:
        RingCorrupted: the shared memory was used before.
        OSError: no address space or descriptor. The peer is closed then.
    """

    def __init__(self, peer: peers.Peer, beside: int = 0) -> None:
        self.peer = peer
        self.dead = False
        """Set by whoever watches `peer.pidfd`."""
        wake = ring.signal(peer.wake)
        try:
            sending, receiving = (
                memory.attach(fd, ring.size_of(size))
                for fd, size in zip((peer.sending, peer.receiving), peer.sizes, strict=True)
            )
            self.producer = ring.Producer(sending, wake)
            self.consumer = ring.Consumer(receiving, wake)
        except BaseException:
            peer.close()
            raise
        self.large = self.producer.capacity // 8
        """Messages of more bytes go in segments."""
        self._backlog: deque[tuple[int, list[Buffer]]] = deque()
        self._segments: deque[int] = deque()
        """Where the records of segments under way end."""
        self._passed = 0
        """Number of the last descriptor."""
        self._most_beside = beside
        self._own: tuple[mmap.mmap, int] | None = None
        """Memory beside the ring for what is sent, and the number of its descriptor."""
        self._own_until = 0
        """It is free when the peer has released up to here."""
        self._theirs: tuple[mmap.mmap, int] | None = None
        """The same for what is received."""

    @property
    def backlog(self) -> int:
        """Messages that wait for room."""
        return len(self._backlog)

    def put(self, kind: int, frames: Sequence[Buffer]) -> None:
        """Send a message, now or, in its turn, when there is room (`flush`). Never blocks.

        Until then the frames are kept, not copied.

        Raises:
            OSError: see `send`; the message is not sent.
        """
        if self._backlog or not self.send(kind, frames):
            self._backlog.append((kind, list(frames)))

    def flush(self) -> bool:
        """Send what waits for room; whether nothing waits any more.

        Raises:
            OSError: see `send`; the message still waits.
        """
        while self._backlog:
            if not self.send(*self._backlog[0]):
                return False
            self._backlog.popleft()
        return True

    def send(self, kind: int, frames: Sequence[Buffer]) -> bool:
        """Send a message; False when there is no room, and the peer will wake this end.

        Args:
            kind: 0 to `MAX_KIND`.
            frames: of the message, any number, of any size.

        Raises:
            OSError: no memory or descriptor for a segment. Nothing was sent.
            RingCorrupted: the peer's position is impossible.
        """
        assert kind <= MAX_KIND, kind
        sizes = [memoryview(frame).nbytes for frame in frames]
        total, places = _layout(sizes)
        if total > self.large:
            if total <= self._most_beside and self._own_until <= self.producer.released:
                return self._send_beside(kind, frames, sizes, total, places)
            return self._send_segment(kind, frames, sizes, total, places)
        view = self.producer.reserve(total)
        if view is None:
            return False
        _fill(view, frames, sizes, places)
        self.producer.publish(kind)
        return True

    def _send_beside(
        self, kind: int, frames: Sequence[Buffer], sizes: list[int], total: int, places: list[int]
    ) -> bool:
        own = self._own
        if own is None:
            try:
                own = self._own = self._new_beside()
            except (BrokenPipeError, ConnectionResetError):
                return True  # nobody is there to read it
            if own is None:
                return False
        record = self.producer.reserve(_BESIDE_PLACE.size)
        if record is None:
            return False
        mapped, number = own
        with memoryview(mapped) as view:
            _fill(view, frames, sizes, places)
        _BESIDE_PLACE.pack_into(record, 0, total, number, len(mapped))
        self.producer.publish(kind | BESIDE)
        self._own_until = self.producer.position
        return True

    def _new_beside(self) -> tuple[mmap.mmap, int] | None:
        """Make the memory beside the ring; None where its descriptor cannot be passed now."""
        fd = memory.create(self._most_beside, "scalellm-beside")
        try:
            mapped = memory.attach(fd, self._most_beside)
            return (mapped, self._passed) if self._pass(fd) else None
        finally:
            os.close(fd)

    def _send_segment(
        self, kind: int, frames: Sequence[Buffer], sizes: list[int], total: int, places: list[int]
    ) -> bool:
        if not self._own_until:
            self._own = None  # its descriptor has passed without a message: it would be skipped
        if len(self._segments) >= MOST_SEGMENTS and not self._fewer_segments():
            return False
        view = self.producer.reserve(_PLACE.size)
        if view is None:
            return False
        fd = memory.create(total, "scalellm-segment", allocate=False)
        try:
            _write(fd, frames, sizes, places)
            if not self._pass(fd):
                return False
        except (BrokenPipeError, ConnectionResetError):
            return True  # nobody is there to read it
        finally:
            os.close(fd)
        _PLACE.pack_into(view, 0, total, self._passed)
        self.producer.publish(kind | SEGMENT)
        self._segments.append(self.producer.position)
        return True

    def _fewer_segments(self) -> bool:
        """Forget segments that the peer has taken; where there are none, have it wake this end."""
        segments = self._segments
        for asked in (False, True):
            if asked:
                self.producer.ask_for_room()
            released = self.producer.released
            while segments and segments[0] <= released:
                segments.popleft()
            if len(segments) < MOST_SEGMENTS:
                return True
        return False

    def _pass(self, fd: int) -> bool:
        """Pass a descriptor to the peer; False where the socket is full: it will wake this end."""
        self._passed += 1
        said = [_WORD.pack(self._passed)]
        for asked in (False, True):
            if asked:
                self.producer.ask_for_room()
            with contextlib.suppress(BlockingIOError):
                socket.send_fds(self.peer.socket, said, [fd])
                return True
        return False

    def receive(self) -> Message | None:
        """Return the next message, or None when there is none.

        Raises:
            RingCorrupted: the ring is unusable.
            MessageCorrupted: a segment is not what its record says, or cannot be mapped; the
                channel is unusable.
        """
        record = self.consumer.read()
        if record is None:
            return None
        if record.kind <= MAX_KIND:
            return Message(record.kind, record.data, True)
        kind = record.kind & MAX_KIND
        try:
            if record.kind & BESIDE:
                return Message(kind, self._beside(record.data), True)
            mapped = self._map(*_PLACE.unpack(record.data))
        except (struct.error, OSError, memory.SegmentError) as error:
            raise MessageCorrupted(
                f"segment of a message of kind {kind}, record that ends at {record.end}: {error}"
            ) from None
        return Message(kind, memoryview(mapped), False)

    def _beside(self, record: memoryview) -> memoryview:
        """Return the message beside the ring."""
        total, number, size = _BESIDE_PLACE.unpack(record)
        if self._theirs is None or self._theirs[1] != number:
            self._theirs = (self._map(size, number), number)
        mapped = self._theirs[0]
        if total > len(mapped):
            raise OSError(f"{total} bytes in memory of {len(mapped)}")
        return memoryview(mapped)[:total]

    def _map(self, size: int, number: int) -> mmap.mmap:
        while True:
            said, fds = self._next_descriptor()
            try:
                if not fds:
                    raise OSError("no descriptor came with it (too many open in this process?)")
                (found,) = _WORD.unpack(said)
                if found > number:
                    raise OSError(f"its descriptor, number {number}, is gone; the next is {found}")
                if found == number:
                    return memory.attach(fds[0], size)
            finally:
                for fd in fds:
                    os.close(fd)

    def _next_descriptor(self) -> tuple[bytes, list[int]]:
        with contextlib.suppress(ConnectionResetError):
            return peers.receive(self.peer.socket, _WORD.size, 1)[:2]
        # The peer has ended with descriptors of ours unread. The kernel says so once, before it
        # gives out those that the peer sent.
        return peers.receive(self.peer.socket, _WORD.size, 1)[:2]

    def release(self) -> None:
        """Give back the ring's memory of all messages received."""
        self.consumer.release()

    def close(self) -> None:
        """Let go of everything; the peer notices by this end's socket or process."""
        self._backlog.clear()
        self._own = self._theirs = None
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
        (count,) = _WORD.unpack_from(data, 0)
        sizes = struct.unpack_from(f"<{count}Q", data, 8)
    except struct.error as error:
        raise MessageCorrupted(f"{_named(message)}: number of frames: {error}") from None
    total, places = _layout(sizes)
    if total > len(data):
        raise MessageCorrupted(f"{_named(message)}: frames of {sizes[:8]} would take {total}")
    return [data[place : place + size] for place, size in zip(places, sizes, strict=True)]


def _named(message: Message) -> str:
    return f"message of kind {message.kind}, {len(message.data)} bytes"


def _layout(sizes: Sequence[int]) -> tuple[int, list[int]]:
    """Bytes of a message and where its frames begin: number of frames, sizes, frames."""
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


def _write(fd: int, frames: Sequence[Buffer], sizes: list[int], places: list[int]) -> None:
    """As `_fill`, without a mapping: its page faults cost twice as much as the copy."""
    head = struct.pack(f"<{1 + len(sizes)}Q", len(sizes), *sizes)
    parts = zip((head, *frames), (len(head), *sizes), (0, *places), strict=True)
    for part, size, place in parts:
        done = 0
        while done < size:  # a write takes at most 2 GiB
            done += os.pwrite(fd, memoryview(part).cast("B")[done:], place + done)
