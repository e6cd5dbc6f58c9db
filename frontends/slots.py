"""Memory that all workers of a server share: who accepts, how busy each is.

One anonymous mapping, made before the first worker is forked and inherited by every one: nothing
of it has a name, so nothing can be left behind in /dev/shm. Every field has one writer (its slot's
worker, or the supervisor while the slot has none) and is one aligned machine word, so readers need
no lock: they see the old value or the new one.

Layout, in native byte order, for `count` slots::

    loads       count × int32, padded to 64 bytes     open connections; NOT_ACCEPTING: none, please
    admission   count × 64 bytes, 8 × int64 each      word 0: requests of this worker (vLLM's)
    activity    count × 64 bytes, 8 × float64 each    word 0: busy, 1: connections, 2: beat

A slot's line is 64 bytes so that no two writers share a cache line; `loads` is the exception,
because vLLM's accept loop takes it as one contiguous array.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

from .admission import Admission
from .shared_state import SharedState

NOT_ACCEPTING = 2**31 - 1
"""The load of a slot that takes no connections, as in vLLM: never the least loaded."""

_LINE = 64
_WORDS = _LINE // 8


@dataclass(frozen=True)
class Activity:
    """How busy a worker was, when it last looked.

    `busy` is the share of wall time that its event loop's thread ran or wanted a core, 0 to 1;
    `connections` are open; `beat` is when, in seconds of `time.monotonic`, 0 for never.
    """

    busy: float
    connections: int
    beat: float


class SlotTable:
    """The shared table for `count` slots; see the module for its layout."""

    def __init__(self, count: int) -> None:
        self.count = count
        loads = -(-4 * count // _LINE) * _LINE
        table = count * _LINE
        memory = memoryview(mmap.mmap(-1, loads + 2 * table))
        self.loads = memory[: 4 * count].cast("i")
        self.admission = memory[loads : loads + table].cast("q")
        self._activity = memory[loads + table :].cast("d")
        self.counters = Admission.create(count)
        self.state = SharedState(count)
        for index in range(count):
            self.loads[index] = NOT_ACCEPTING

    def publish(self, index: int, activity: Activity) -> None:
        """Write a worker's line; by that worker."""
        at = index * _WORDS
        self._activity[at] = activity.busy
        self._activity[at + 1] = activity.connections
        self._activity[at + 2] = activity.beat

    def activity(self, index: int) -> Activity:
        """Read a worker's line."""
        at = index * _WORDS
        busy, connections, beat = self._activity[at : at + 3]
        return Activity(busy, int(connections), beat)

    def clear(self, index: int) -> None:
        """Forget a worker that is gone: what it held is no load any more; by the supervisor."""
        self.loads[index] = NOT_ACCEPTING
        for word in range(_WORDS):
            self.admission[index * _WORDS + word] = 0
        self.publish(index, Activity(0.0, 0, 0.0))
        self.counters.forget(index)
        self.state.clear(index)
