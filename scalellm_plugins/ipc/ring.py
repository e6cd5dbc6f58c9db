"""A ring of byte records in shared memory: one process writes, one reads, nobody locks.

Layout (8-byte words, little-endian): a page of control words, each on a cache line of its own, then
`capacity` bytes of records. A record is a header word (length in bytes, kind, sequence number from
1, so that zeroed memory is no record) and its payload, padded to 8 bytes; it never wraps: what does
not fit before the end follows a filler. Positions count bytes since the beginning and only grow
(2^64 are 58 years at 10 GB/s); the place is `position % capacity`.

**No torn records.** The producer writes header and payload and then the tail, one aligned 8-byte
store; the consumer reads nothing behind the tail. A producer that is killed in between has
published nothing. CPython stores a "Q" item with one 8-byte move, atomic where it is aligned (Intel
SDM vol. 3A, 9.1.1; Arm ARM, B2.2), and two bytecodes are two calls, which no compiler reorders. On
x86-64 the processor keeps stores in order, and loads, and a load before a later store (SDM 9.2.2;
AMD APM vol. 2, 7.1); a copy by string instructions is complete before the next store (SDM 9.2.4),
and where the C library copies past the caches it fences by itself. AArch64 keeps none of this:
there a fence stands between payload and tail, tail and payload, payload and head, head and payload
(`WEAK`).

**No lost wake-ups, no needless ones.** A side that is about to sleep says so in a flag, then looks
once more; the other publishes, then looks at the flag. Between store and load both sides need a
full barrier, on x86-64 too. Whoever clears the other's flag calls `wake` next, so a flag that its
owner sets anew in between is not lost with it: the owner wakes up, looks, and sets it again. For
this, a sleeper takes its wake-up (reads its eventfd) before it looks, not after.

Python has no barrier of its own. A fence here releases and takes back a lock that nobody else has.
In CPython, with semaphores or (from 3.14) mutexes of its own, this is a read-modify-write with
release semantics (nothing before moves behind it), then one of the same word with acquire semantics
(nothing behind moves before it). On x86-64 either is a locked instruction and a full barrier; on
AArch64 an acquire does not pass a release before it (Arm ARM, B2.3). Python can switch threads
between the two, hence a lock for each side of a ring.

**Threads, signals, forks.** A side is one thread's at a time, with and without the GIL. Python runs
signal handlers after calls and at loops only, so an exception out of one cannot fall between the
stores of a record: it can cost a wake-up, which the next record makes good, or the reader the
record that it was about to get. A forked child inherits the mapping and must leave it alone: it
would be a second writer.
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


def _fence() -> Callable[[], None]:
    """Return a full barrier: this thread's loads and stores before it come before those behind."""
    lock = _thread.allocate_lock()
    lock.acquire()
    release, acquire = lock.release, lock.acquire

    def fence() -> None:
        try:
            release()
        except RuntimeError:  # a signal handler raised between these lines, some time ago
            acquire()
            release()
        acquire()

    return fence


class _Side:
    """What both sides have: the mapped memory, as words and as bytes."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.capacity = len(memory) - CONTROL
        size_of(self.capacity)
        self._mask = self.capacity - 1
        self._memory = memory
        self._bytes = memoryview(memory)
        self._words = words = self._bytes.cast("Q")
        self._fence = _fence()
        if not words[_MAGIC]:
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

    Raises:
        RingCorrupted: not a ring, or one that another producer has used.
        ValueError: memory of a size that no ring has.
    """

    def __init__(self, memory: mmap.mmap, wake: Callable[[], Any]) -> None:
        super().__init__(memory)
        if self._words[_TAIL] or self._words[_HEAD]:
            raise RingCorrupted("a ring has one producer, from its beginning; this one was used")
        self._wake = wake
        self._tail = self._head = 0
        self._sequence = 1
        self._reserved = -1
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
        self._reserved = -1
        needed = _WORD + (size + 7 & -8)
        tail = self._tail
        to_end = self.capacity - (tail & self._mask)
        if needed > to_end:
            if self.capacity - (tail - self._head) < to_end and not self._wait_for(to_end):
                return None
            # It must wake the consumer, too: a long record needs the filler's own room.
            self._put(to_end - _WORD, FILLER, to_end)
            tail = self._tail
        if self.capacity - (tail - self._head) < needed and not self._wait_for(needed):
            return None
        self._reserved = size
        start = CONTROL + (tail & self._mask) + _WORD
        return self._bytes[start : start + size]

    def publish(self, kind: int) -> None:
        """Make the reserved record visible to the consumer, and wake it if it sleeps.

        Args:
            kind: 0 to `MAX_KIND`.
        """
        size = self._reserved
        assert size >= 0 <= kind <= MAX_KIND, (size, kind)
        self._put(size, kind, _WORD + (size + 7 & -8))
        self._reserved = -1

    def write(self, kind: int, data: Any) -> bool:
        """Copy a record of bytes into the ring; False when it is full (see `reserve`)."""
        view = self.reserve(len(data))
        if view is None:
            return False
        view[:] = data
        self.publish(kind)
        return True

    def ask_for_room(self) -> None:
        """Have the consumer's next release wake this side, whatever the ring's room.

        Look again after this at what was missing: it may have been released before.
        """
        self._words[_STARVED] = 1
        self._fence()

    @property
    def released(self) -> int:
        """The position up to which the consumer has released, and reads nothing any more."""
        head = self._words[_HEAD]
        if WEAK:
            self._fence()
        return head

    @property
    def position(self) -> int:
        """The position behind the last record."""
        return self._tail

    def _put(self, size: int, kind: int, length: int) -> None:
        words = self._words
        tail = self._tail
        sequence = self._sequence
        words[CONTROL + (tail & self._mask) >> 3] = sequence << 48 | kind << 32 | size
        if WEAK:
            self._fence()
        # No call in these two lines: see the module about signals.
        words[_TAIL] = self._tail = tail + length
        self._sequence = sequence % 0xFFFF + 1
        self._fence()
        if words[_PARKED]:
            words[_PARKED] = 0  # before the wake-up: the consumer sets it again when it sleeps
            self._wake()

    def _wait_for(self, needed: int) -> bool:
        """Look at what the consumer has released; ask it for a wake-up when that is too little."""
        words = self._words
        tail = self._tail
        for starved in (False, True):
            if starved:
                self.ask_for_room()
            head = words[_HEAD]
            if not self._head <= head <= tail or head & 7:
                raise RingCorrupted(
                    f"record {self._sequence} at {tail}: the consumer's position {head} is not a "
                    f"multiple of 8 from {self._head} to {tail}"
                )
            self._head = head
            if WEAK:
                self._fence()
            if self.capacity - (tail - head) >= needed:
                words[_STARVED] = 0
                return True
        return False


class Consumer(_Side):
    """The reading side. `wake` is called when the producer waits for room and there is some.

    Not thread-safe.

    Raises:
        RingCorrupted: not a ring, or one that another consumer has used.
        ValueError: memory of a size that no ring has.
    """

    def __init__(self, memory: mmap.mmap, wake: Callable[[], Any]) -> None:
        super().__init__(memory)
        if self._words[_HEAD]:
            raise RingCorrupted("a ring has one consumer, from its beginning; this one was used")
        self._wake = wake
        self._tail = self._next = self._head = 0
        self._sequence = 1
        self._skipped = (0, 0)
        """Where the last filler begins and ends: it goes with the record before it."""

    def read(self) -> Record | None:
        """Return the next record, or None when there is none. Release it when done with it.

        Raises:
            RingCorrupted: what is there was not written by a producer; the ring is unusable.
        """
        while True:
            position = self._next
            if position == self._tail and not self._look():
                return None
            offset = position & self._mask
            header = self._words[CONTROL + offset >> 3]
            size = header & 0xFFFFFFFF
            length = _WORD + (size + 7 & -8)
            end = position + length
            if (
                header >> 48 != self._sequence
                or end > self._tail
                or offset + length > self.capacity
            ):
                raise self._corrupted(header)
            kind = header >> 32 & 0xFFFF
            if kind == FILLER and offset + length != self.capacity:
                raise self._corrupted(header)
            self._sequence = self._sequence % 0xFFFF + 1
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
            self._fence()
        words[_HEAD] = self._head = end
        self._fence()
        if words[_STARVED]:
            words[_STARVED] = 0
            self._wake()

    def has_more(self) -> bool:
        """False: `read` would return None. True: it may too, when all there is is a filler."""
        return self._next != self._tail or self._words[_TAIL] != self._next

    def park(self) -> bool:
        """Say that this side is going to sleep; False when there is something to read after all.

        After True the producer's next record is followed by a call of its `wake`.
        """
        words = self._words
        words[_PARKED] = 1
        self._fence()
        if words[_TAIL] == self._next:
            return True
        words[_PARKED] = 0
        return False

    def unpark(self) -> None:
        """Say that this side is awake: records need no wake-up until the next `park`."""
        self._words[_PARKED] = 0

    def _look(self) -> bool:
        """Look at what the producer has published; whether there is anything new."""
        tail = self._words[_TAIL]
        position = self._next
        if tail == position:
            return False
        if WEAK:
            self._fence()
        most = self._head + self.capacity
        if not position < tail <= most or tail & 7:
            raise RingCorrupted(
                f"record {self._sequence} at {position}: the producer's position {tail} is not a "
                f"multiple of 8 from {position} to {most}"
            )
        self._tail = tail
        return True

    def _corrupted(self, header: int) -> RingCorrupted:
        return RingCorrupted(
            f"record {self._sequence} at {self._next}: header {header:#018x} says number "
            f"{header >> 48}, kind {header >> 32 & 0xFFFF}, {header & 0xFFFFFFFF} bytes; "
            f"published up to {self._tail}"
        )


def signal(fd: int) -> Callable[[], Any]:
    """Return a `wake` that makes an eventfd readable."""

    def wake(write: Callable[..., Any] = os.eventfd_write) -> None:
        write(fd, 1)

    return wake
