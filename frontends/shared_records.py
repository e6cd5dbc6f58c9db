"""Records that any worker writes and any reads, the oldest forgotten when there is no room.

A ring in memory without a name, made before the first worker is forked. Offsets count all bytes
ever written; a record lies at its offset modulo the ring's size, never across its end. What is
between `tail` and `head` is there. Writers take a lock that the kernel takes back from a worker
that dies; they move `tail` before they overwrite and `head` when a record is whole. Readers take
none: what they copied counts if `tail` has not passed it meanwhile.

Layout: words (int64) 0 tail, 1 head; from 64 on the ring. A record is three words (bytes in all, of
the key, of the value; a key of -1 is padding), key and value, padded to 8. Pure.
"""

from __future__ import annotations

import mmap
import struct

from .shared_counters import SharedLock

_HEADER = 64
_TAIL, _HEAD = 0, 1
_PREFIX = struct.Struct("qqq")  # bytes in all, of the key, of the value
_PADDING = -1


class Records:
    """The ring, `size` bytes (memory is used as it fills); see the module."""

    def __init__(self, size: int) -> None:
        assert size % 8 == 0, size
        self._size = size
        self._lock = SharedLock("scalellm_records")
        self._memory = mmap.mmap(-1, _HEADER + size)
        self._words = memoryview(self._memory)[:_HEADER].cast("q")
        self._known: dict[bytes, int] = {}
        self._read_to = 0

    def put(self, key: bytes, value: bytes) -> bool:
        """Write a record, in place of an older one with its key; False if it is too large."""
        length = -(-(_PREFIX.size + len(key) + len(value)) // 8) * 8
        if length > self._size // 2:
            return False
        with self._lock:
            head = self._words[_HEAD]
            to_end = self._size - head % self._size
            if length > to_end:
                self._make_room(head + to_end)
                if to_end >= _PREFIX.size:
                    self._write(head, _PREFIX.pack(to_end, _PADDING, 0))
                head += to_end
            self._make_room(head + length)
            self._write(head, _PREFIX.pack(length, len(key), len(value)) + key + value)
            self._words[_HEAD] = head + length
        return True

    def _make_room(self, end: int) -> None:
        """Forget the oldest records until the ring can reach to `end`."""
        tail = self._words[_TAIL]
        while end - tail > self._size:
            tail = self._after(tail)
        self._words[_TAIL] = tail

    def _after(self, offset: int) -> int:
        """The offset of the record behind the one at `offset`."""
        to_end = self._size - offset % self._size
        if to_end < _PREFIX.size:
            return offset + to_end
        length, _, _ = self._prefix(offset)
        return offset + length

    def _prefix(self, offset: int) -> tuple[int, int, int]:
        found: tuple[int, int, int] = _PREFIX.unpack_from(
            self._memory, _HEADER + offset % self._size
        )
        return found

    def _write(self, offset: int, data: bytes) -> None:
        at = _HEADER + offset % self._size
        self._memory[at : at + len(data)] = data

    def get(self, key: bytes) -> bytes | None:
        """Return the newest record with this key, or None."""
        self._look()
        offset = self._known.get(key)
        if offset is None:
            return None
        _, key_size, size = self._prefix(offset)
        at = _HEADER + offset % self._size + _PREFIX.size + key_size
        value = self._memory[at : at + size]
        if self._words[_TAIL] > offset:
            del self._known[key]
            return None
        return value

    def _look(self) -> None:
        """Learn the keys that were added since the last look, and forget those that are gone."""
        offset, head = self._read_to, self._words[_HEAD]
        while offset < head:
            tail = self._words[_TAIL]
            if offset < tail:  # overtaken
                offset = tail
                self._known = {key: at for key, at in self._known.items() if at >= tail}
                continue
            if self._size - offset % self._size >= _PREFIX.size:
                _, key_size, _ = self._prefix(offset)
                at = _HEADER + offset % self._size + _PREFIX.size
                key = self._memory[at : at + key_size] if 0 <= key_size <= self._size else b""
                following = self._after(offset)
                if self._words[_TAIL] > offset:
                    continue
                if key_size != _PADDING:
                    self._known[key] = offset
            else:
                following = self._after(offset)
            offset = following
        self._read_to = offset
