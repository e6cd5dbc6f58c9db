"""Counts of every worker that are read as one: for the statistics line, `/load` and queue limits.

One anonymous mapping, made before the first worker is forked. A word is written by its slot's
worker only; a sum may be a moment old, never torn. Layout, native byte order::

    flow     slots × ENGINES × 32 float64   what a worker heard from each engine; only grows
    news     slots × ENGINES × 8 float64    the newest state of an engine's scheduler that it heard
    load     slots × 8 int64                word 0: what vLLM's application counts for `/load`

Pure: imports neither vLLM nor torch.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

ENGINES = 256
"""Most engines (data parallel ranks) of a server. Memory is only used for those that are there."""

FLOW = (
    *("prompt_tokens", "generation_tokens", "corrupted", "preempted"),
    *("prefix_resets", "prefix_requests", "prefix_queries", "prefix_hits"),
    *("connector_resets", "connector_requests", "connector_queries", "connector_hits"),
    *("mm_resets", "mm_requests", "mm_queries", "mm_hits"),
)
NEWS = ("sent", "running", "waiting", "skipped", "kv_usage")
_FLOW_WORDS = 32
_NEWS_WORDS = 8
_LOAD_WORDS = 8


class Board:
    """See the module. `slots`: how many workers there can be."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        flow = slots * ENGINES * _FLOW_WORDS * 8
        news = slots * ENGINES * _NEWS_WORDS * 8
        memory = memoryview(mmap.mmap(-1, flow + news + slots * _LOAD_WORDS * 8))
        self._flow = memory[:flow].cast("d")
        self._news = memory[flow : flow + news].cast("d")
        self._load = memory[flow + news :].cast("q")

    # The statistics line

    def add(self, slot: int, engine: int, first: str, amounts: Sequence[float]) -> None:
        """Add to consecutive counts, from the one called `first`; by the slot's worker."""
        at = (slot * ENGINES + engine) * _FLOW_WORDS + FLOW.index(first)
        words = self._flow
        for place, amount in enumerate(amounts, at):
            if amount:
                words[place] += amount

    def tell(self, slot: int, engine: int, news: Sequence[float]) -> None:
        """Note the state of an engine's scheduler, in the order of `NEWS`; by the slot's worker."""
        at = (slot * ENGINES + engine) * _NEWS_WORDS
        for place, value in enumerate(news, at):
            self._news[place] = value

    def totals(self, engine: int) -> dict[str, float]:
        """Return every count over all slots, those of workers that are gone included."""
        starts = [(slot * ENGINES + engine) * _FLOW_WORDS for slot in range(self._slots)]
        return {
            name: sum(self._flow[start + place] for start in starts)
            for place, name in enumerate(FLOW)
        }

    def newest(self, engine: int) -> dict[str, float]:
        """Return what the engine's last message to any worker said; zeros before the first."""
        lines = []
        for slot in range(self._slots):
            at = (slot * ENGINES + engine) * _NEWS_WORDS
            lines.append(list(self._news[at : at + len(NEWS)]))
        return dict(zip(NEWS, max(lines), strict=True))

    # /load

    def set_load(self, slot: int, load: int) -> None:
        """Note how many requests a worker serves; by it."""
        self._load[slot * _LOAD_WORDS] = load

    def load(self) -> int:
        """Return how many requests all workers serve."""
        return sum(self._load[slot * _LOAD_WORDS] for slot in range(self._slots))

    def clear(self, slot: int) -> None:
        """Forget what a worker that is gone had in hand; by the supervisor."""
        self._load[slot * _LOAD_WORDS] = 0
