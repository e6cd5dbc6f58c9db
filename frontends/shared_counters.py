"""Counters that all workers of a server share, and a lock between processes.

Both are made before the first worker is forked and have no name. A counter is the sum of one word
(int64) per worker slot: a word is written by its slot's worker only, and at once, so what a worker
that died has left is whole. Nobody needs a lock to read or to take away: a sum that is read a
moment too early is too large, never too small. Who looks at sums and then adds holds the lock
meanwhile, so that nothing is added elsewhere in between. Pure: imports neither vLLM nor torch.
"""

from __future__ import annotations

import fcntl
import mmap
import os


class SharedLock:
    """A record lock (fcntl) on a file in memory; a context manager.

    The kernel takes it back when its holder dies, at whatever instruction. It does not exclude
    threads of one process: use it from the event loop only, for a few dozen bytecodes.
    """

    __slots__ = ("_file",)

    def __init__(self, name: str) -> None:
        """`name`: of the file, as /proc/PID/fd shows it."""
        self._file = os.memfd_create(name, os.MFD_CLOEXEC)

    def __enter__(self) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_error: object) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN)


class SharedCounters:
    """`count` counters over `slots` workers. Layout: `word[counter * slots + slot]`.

    Memory is only used for those that are not 0.
    """

    __slots__ = ("_words", "slots")

    def __init__(self, count: int, slots: int) -> None:
        self.slots = slots
        self._words = memoryview(mmap.mmap(-1, count * slots * 8)).cast("q")

    def sum(self, counter: int) -> int:
        """Return what a counter has over all workers."""
        at = counter * self.slots
        return sum(self._words[at : at + self.slots])

    def add(self, counter: int, slot: int, amount: int) -> None:
        """Add to a worker's own share."""
        self._words[counter * self.slots + slot] += amount

    def put(self, counter: int, slot: int, value: int) -> None:
        """Replace a worker's own share, or that of one that is gone."""
        self._words[counter * self.slots + slot] = value
