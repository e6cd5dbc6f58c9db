"""A ring of byte records in shared memory: one process writes, one reads, nobody locks.

Layout (8-byte words, little-endian): a page of control words, each on a cache line of its own, then
`capacity` bytes of records. A record is a header word (length in bytes, kind, sequence number) and
its payload, padded to 8 bytes; it never wraps: what does not fit before the end follows a filler.
Positions count bytes since the beginning and only grow; the place is `position % capacity`.

**No torn records.** The producer writes header and payload and then the tail, one aligned 8-byte
store; the consumer reads nothing behind the tail. A producer that is killed in between has
published nothing. On x86-64 the processor keeps stores in order, and loads (Intel SDM vol. 3A,
9.2.2; AMD APM vol. 2, 7.1), and CPython compiles the stores of two bytecodes as two calls, which no
compiler reorders. AArch64 keeps neither: there `fence()` stands between payload and tail, tail and
payload, payload and head.

**No lost wake-ups, no needless ones.** A side that is about to sleep says so in a flag, then looks
once more; the other publishes, then looks at the flag. Between store and load both sides need a
full barrier, on x86-64 too: `fence()`.

Python has no barrier of its own. `fence()` releases and takes back a lock that this thread always
holds: a release (nothing before moves behind it), then an acquire of the same word (nothing behind
moves before it), which neither architecture lets pass each other (Arm ARM, B2.3: Load-Acquire is
ordered after Store-Release).
"""

from __future__ import annotations

import _thread
import contextlib
import mmap
import os
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

from scalellm_plugins.errors import ScaleLLMError

CONTROL = mmap.PAGESIZE
"""Bytes before the records."""

MAGIC = 0x31474E49524C4C53  # "SLLRING1"
FILLER = 0xFFFF
MAX_KIND = 0xFFFE
MAX_CAPACITY = 1 << 31

_MAGIC, _CAPACITY = 0, 1
_TAIL, _HEAD, _PARKED, _STARVED = 8, 16, 24, 32  # 64 bytes apart
_WORD = 8

_barrier = _thread.allocate_lock()
_barrier.acquire()
_release, _acquire = _barrier.release, _barrier.acquire


def fence() -> None:
    """Order this thread's loads and stores before it against those behind it. ~60 ns."""
    _release()
    _acquire()


WEAK = platform.machine() not in ("x86_64", "AMD64", "i686", "i386")
"""Whether plain stores, or plain loads, may pass each other on this processor."""


class RingCorrupted(ScaleLLMError):
    """A ring holds what its producer, or its consumer, cannot have written."""


class Record(NamedTuple):
    """One record. `data` is a view of the ring, valid until `end` or something behind is released.

    Copy what must live longer: after the release the producer writes over it.
    """

    kind: int
    data: memoryview
    end: int


def size_of(capacity: int) -> int:
    """Return the bytes of shared memory that a ring takes.

    Raises:
        ValueError: the capacity is not a power of two from 4 KiB to 2 GiB.
    """
    if capacity & (capacity - 1) or not 4096 <= capacity <= MAX_CAPACITY:
        raise ValueError(
            f"ring of {capacity} bytes: the capacity must be a power of two, 4096 to {MAX_CAPACITY}"
        )
    return CONTROL + capacity


class _Side:
    """What both sides have: the mapped memory, as words and as bytes."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("Q")
        self.capacity = len(memory) - CONTROL
        self._mask = self.capacity - 1
        words = self._words
        if not words[_MAGIC]:
            size_of(self.capacity)
            words[_CAPACITY] = self.capacity
            words[_MAGIC] = MAGIC
        elif words[_MAGIC] != MAGIC or words[_CAPACITY] != self.capacity:
            raise RingCorrupted(
                f"not a ring of {self.capacity} bytes: magic {words[_MAGIC]:#x}, capacity "
                f"{words[_CAPACITY]}"
            )

    def close(self) -> None:
        """Unmap the ring; the other side keeps its mapping. Views that are still held keep it."""
        self._words.release()
        self._bytes.release()
        with contextlib.suppress(BufferError):  # a record is being read: unmapped with that view
            self._memory.close()


class Producer(_Side):
    """The writing side. `wake` is called when the consumer sleeps and there is something to read.

    Not thread-safe.
    """

    def __init__(self, memory: mmap.mmap, wake: Callable[[], Any]) -> None:
        super().__init__(memory)
        self._wake = wake
        self._tail = self._words[_TAIL]
        self._head = self._words[_HEAD]
        self._sequence = 0
        self._reserved = 0
        self.longest = self.capacity - _WORD
        """The largest payload of a record, in bytes."""

    def reserve(self, size: int) -> memoryview | None:
        """Return room for `size` bytes to write before `publish`; None when the ring is full.

        After a None, the consumer wakes the producer when it has released something.

        Raises:
            ValueError: no ring of this capacity could ever hold it.
            RingCorrupted: the consumer's position is impossible.
        """
        if size > self.longest:
            raise ValueError(f"record of {size} bytes; this ring takes up to {self.longest}")
        needed = _WORD + (size + 7 & -8)
        tail = self._tail
        to_end = self.capacity - (tail & self._mask)
        if needed > to_end:
            if self._room(tail) < to_end and not self._wait_for(tail, to_end):
                return None
            self._put_header(tail, to_end - _WORD, FILLER)
            tail = self._publish(tail + to_end)
        if self._room(tail) < needed and not self._wait_for(tail, needed):
            return None
        start = CONTROL + (tail & self._mask) + _WORD
        self._reserved = size
        return self._bytes[start : start + size]

    def publish(self, kind: int) -> None:
        """Make the reserved record visible to the consumer, and wake it if it sleeps."""
        size = self._reserved
        self._put_header(self._tail, size, kind)
        self._publish(self._tail + _WORD + (size + 7 & -8))
        words = self._words
        fence()
        if words[_PARKED]:
            words[_PARKED] = 0  # before the wake-up: the consumer sets it again when it sleeps
            self._wake()

    def write(self, kind: int, data: Any) -> bool:
        """Copy a record of bytes into the ring; False when it is full (see `reserve`)."""
        view = self.reserve(len(data))
        if view is None:
            return False
        view[:] = data
        self.publish(kind)
        return True

    def ask_for_room(self) -> None:
        """Have the consumer's next release wake this side, whatever the ring's room."""
        self._words[_STARVED] = 1
        fence()

    @property
    def released(self) -> int:
        """The position up to which the consumer has released."""
        return self._words[_HEAD]

    @property
    def position(self) -> int:
        """The position behind the last record."""
        return self._tail

    def _put_header(self, position: int, size: int, kind: int) -> None:
        self._words[CONTROL + (position & self._mask) >> 3] = (
            self._sequence << 48 | kind << 32 | size
        )
        self._sequence = self._sequence + 1 & 0xFFFF

    def _publish(self, tail: int) -> int:
        if WEAK:
            fence()
        self._words[_TAIL] = self._tail = tail
        return tail

    def _room(self, tail: int) -> int:
        return self.capacity - (tail - self._head)

    def _wait_for(self, tail: int, needed: int) -> bool:
        """Look at what the consumer has released; ask it for a wake-up when that is too little."""
        words = self._words
        for starved in (0, 1):
            if starved:
                words[_STARVED] = 1
                fence()
            head = words[_HEAD]
            if not self._head <= head <= tail or head & 7:
                raise RingCorrupted(
                    f"consumer's position {head}: not in {self._head} to {tail}, in words"
                )
            self._head = head
            if self.capacity - (tail - head) >= needed:
                words[_STARVED] = 0
                if WEAK:
                    fence()
                return True
        return False


class Consumer(_Side):
    """The reading side. `wake` is called when the producer waits for room and there is some.

    Not thread-safe.
    """

    def __init__(self, memory: mmap.mmap, wake: Callable[[], Any]) -> None:
        super().__init__(memory)
        self._wake = wake
        self._tail = self._words[_TAIL]
        self._next = self._head = self._words[_HEAD]
        self._sequence = 0
        self._skipped = (0, 0)
        """Where the last filler begins and ends: it goes with the record before it."""

    def read(self) -> Record | None:
        """Return the next record, or None when there is none. Release it when done with it.

        Raises:
            RingCorrupted: what is there was not written by a producer; the ring is unusable.
        """
        while True:
            position = self._next
            if position == self._tail:
                tail = self._words[_TAIL]
                if tail == position:
                    return None
                if WEAK:
                    fence()
                if not 0 < tail - self._head <= self.capacity or tail < position or tail & 7:
                    raise RingCorrupted(
                        f"producer's position {tail}: not in {position} to "
                        f"{self._head + self.capacity}, in words"
                    )
                self._tail = tail
            offset = position & self._mask
            header = self._words[CONTROL + offset >> 3]
            size = header & 0xFFFFFFFF
            kind = header >> 32 & 0xFFFF
            end = position + _WORD + (size + 7 & -8)
            if (
                header >> 48 != self._sequence
                or end > self._tail
                or offset + end - position > self.capacity
            ):
                raise RingCorrupted(
                    f"record {self._sequence} at {position}: header {header:#018x} says number "
                    f"{header >> 48}, kind {kind}, {size} bytes; published up to {self._tail}"
                )
            self._sequence = self._sequence + 1 & 0xFFFF
            self._next = end
            if kind != FILLER:
                start = CONTROL + offset + _WORD
                return Record(kind, self._bytes[start : start + size], end)
            self._skipped = (position, end)
            if self._head == position:
                self.release(end)

    def release(self, end: int | None = None) -> None:
        """Give back what was read: up to `end` (`Record.end`), by default everything.

        Raises:
            ValueError: `end` lies before something released, or behind what was read.
        """
        if end is None:
            end = self._next
        elif not self._head <= end <= self._next:
            raise ValueError(f"release up to {end}: not in {self._head} to {self._next}")
        if end == self._skipped[0]:
            end = self._skipped[1]
        words = self._words
        if WEAK:
            fence()
        words[_HEAD] = self._head = end
        fence()
        if words[_STARVED]:
            words[_STARVED] = 0
            self._wake()

    def has_more(self) -> bool:
        """Whether there is a record to read."""
        return self._next != self._tail or self._words[_TAIL] != self._next

    def park(self) -> bool:
        """Say that this side is going to sleep; False when there is something to read after all.

        After True the producer's next record is followed by a call of its `wake`.
        """
        words = self._words
        words[_PARKED] = 1
        fence()
        if words[_TAIL] == self._next:
            return True
        words[_PARKED] = 0
        return False

    def unpark(self) -> None:
        """Say that this side is awake: records need no wake-up until the next `park`."""
        self._words[_PARKED] = 0


def signal(fd: int) -> Callable[[], Any]:
    """Return a `wake` that makes an eventfd readable."""

    def wake(write: Callable[..., Any] = os.eventfd_write) -> None:
        write(fd, 1)

    return wake
