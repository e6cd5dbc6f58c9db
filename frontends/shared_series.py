"""The samples of one worker slot's metrics, in memory that every worker can read.

Each slot has a file in memory without a name, made before the first worker is forked. Its slot's
worker writes; whoever answers `/metrics` reads. The next worker of the slot goes on where the last
one ended, at whatever instruction it did: so a counter never goes down, and there is nothing to
merge or to clean up. Entries are only ever appended, and one is there for readers once the length
covers it.

Layout, native byte order, 8-byte words: word 0 the length in bytes, word 1 the process id of the
slot's worker (0: none); then the entries: the key's length, the value (float64), a stamp (float64)
and the key, padded to 8 bytes. Pure: imports neither vLLM nor prometheus_client.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

_HEADER = 16
_FIRST_BYTES = 1 << 18
_LENGTH, _PID = 0, 1


class Series:
    """One slot's entries; see the module. Use `at` and `words` from one process at a time."""

    def __init__(self) -> None:
        self._file = os.memfd_create("scalellm_metrics", os.MFD_CLOEXEC)
        os.ftruncate(self._file, _FIRST_BYTES)
        self._map()
        self._ints[_LENGTH] = _HEADER
        self._known: dict[bytes, int] = {}
        self._parsed = _HEADER

    def _map(self) -> None:
        """Map the file as large as it is; older views stay valid, on the same pages."""
        self._size = os.fstat(self._file).st_size
        self._memory = mmap.mmap(self._file, self._size)
        self._ints = memoryview(self._memory).cast("q")
        self.words = memoryview(self._memory).cast("d")
        """Values and stamps. A larger file has a larger view: keep none across `at`."""

    def _parse(self) -> None:
        """Learn the entries that were added since the last look."""
        length = self._ints[_LENGTH]
        if length > self._size:
            self._map()
        while self._parsed < length:
            word = self._parsed // 8
            size = self._ints[word]
            start = self._parsed + 24
            self._known[self._memory[start : start + size]] = word + 1
            self._parsed = start + _padded(size)

    # Writing

    def at(self, key: bytes) -> tuple[int, bool]:
        """Return the word at which the value of `key` is, its stamp following, and if it is new."""
        self._parse()
        known = self._known.get(key)
        if known is not None:
            return known, False
        end = self._parsed + 24 + _padded(len(key))
        if end > self._size:
            os.ftruncate(self._file, 2 * max(self._size, end))
            self._map()
        word = self._parsed // 8
        self._ints[word] = len(key)
        self.words[word + 1] = self.words[word + 2] = 0.0
        self._memory[self._parsed + 24 : self._parsed + 24 + len(key)] = key
        self._known[key] = word + 1
        self._parsed = end
        self._ints[_LENGTH] = end  # from here on it is there
        return word + 1, True

    def occupy(self, pid: int) -> None:
        """Note whose entries these are from now on; 0: nobody's, who may come back as another."""
        self._ints[_PID] = pid

    # Reading

    @property
    def pid(self) -> int:
        """The process id of the slot's worker, or 0."""
        return self._ints[_PID]

    def read(self) -> Iterator[tuple[bytes, float, float]]:
        """Yield key, value and stamp of every entry, oldest first."""
        self._parse()
        words = self.words
        for key, at in self._known.items():
            yield key, words[at], words[at + 1]


def _padded(size: int) -> int:
    return -(-size // 8) * 8
