"""Token ids by segment: turn N of a conversation tokenizes only what is new.

A tokenizer of the `tokenizers` library looks for its added tokens before anything else and
normalizes, pre-tokenizes and merges every piece between two of them alone. So the ids of a
message do not depend on the messages around it, and a prompt is the concatenation of remembered
pieces. The details that break this (overlapping tokens, tokens that swallow the whitespace around
them, prefixes that only the first piece gets) are handled here or refused: `SegmentCache.check`
compares with the plain path on random text, and a cache that fails it is not used.

Pure: knows neither vLLM nor a tokenizer, only a function from text to ids.
"""

from __future__ import annotations

import operator
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import islice

from .cuts import WHITESPACE, overlap

Ids = tuple[int, ...]
# The text of a segment; in a tuple if it starts the prompt, where a tokenizer may treat the same
# text differently.
Key = str | tuple[str]

# Splits per prompt. A prompt of nothing but special tokens would otherwise cost the event loop a
# microsecond for each; any subset of the cuts is exact, so what comes after is one segment.
MAX_CUTS = 8192
# An entry's share of the table beside its text and ids, measured on CPython 3.11 to 3.13.
ENTRY_BYTES = 160
# One segment may take this part of the cache, so that a single huge prompt cannot flush it.
LARGEST_SHARE = 4


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters since the start. hits, misses: segments asked for; bytes, entries: held now."""

    hits: int
    misses: int
    bytes: int
    entries: int


class Plan:
    """One prompt, split: what is known and what must be tokenized.

    `encode` may run in a thread; `SegmentCache.plan` and `commit` belong to the event loop's.
    """

    __slots__ = ("_cache", "_ids", "_new", "_parts", "missing_chars")

    def __init__(
        self,
        cache: SegmentCache,
        parts: list[Ids],
        new: dict[Key, list[int]],
        missing_chars: int,
    ) -> None:
        """Use `SegmentCache.plan`. new: {segment: its places in `parts`}, which are empty yet."""
        self._cache = cache
        self._parts = parts
        self._new = new
        self._ids: list[tuple[Key, Ids]] = []
        self.missing_chars = missing_chars

    def encode(self) -> list[int]:
        """Tokenize what is missing and return the ids of the whole prompt, a new list.

        May be called again; then nothing is missing any more.
        """
        parts = self._parts
        for key, places in self._new.items():
            ids = self._cache.tokenize(key)
            self._ids.append((key, ids))
            for place in places:
                parts[place] = ids
        self._new = {}
        result: list[int] = []
        for part in parts:
            result += part
        return result

    def commit(self) -> None:
        """Remember what `encode` tokenized."""
        if self._ids:
            self._cache.store(self._ids)
            self._ids = []


class SegmentCache:
    """Ids of the text between special tokens, least recently used first out.

    Args:
        encode: text to ids, without what a post-processor adds (BOS); a pure function, called
            from whatever thread calls `Plan.encode`.
        specials: {token: id} to split at. Added tokens that are matched on raw text.
        max_bytes: bound on what is held, `sys.getsizeof` of texts and ids plus a constant per
            entry. The integers are shared by all entries and bounded by the vocabulary.
        lstrip, rstrip: those of `specials` that take the whitespace on that side with them.
        opaque: added tokens that are matched in the same pass but not split at, because a special
            one can overlap with them. See `choose_cuts`, which derives all of these.
        off: why this tokenizer cannot be split; then every prompt is tokenized whole.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        specials: Mapping[str, int],
        max_bytes: int,
        *,
        lstrip: Collection[str] = (),
        rstrip: Collection[str] = (),
        opaque: Collection[str] = (),
        off: str | None = None,
    ) -> None:
        plain = [t for t in specials if t not in lstrip and t not in rstrip]
        # The text behind a cut is tokenized behind this one: a pre-tokenizer that treats the very
        # start of a prompt differently (Metaspace, prepend_scheme "first") then sees the truth.
        prefixes = [t for t in plain if not any(o != t and o.startswith(t) for o in specials)]
        prefixes = [t for t in prefixes if not any(o.startswith(t) for o in opaque)]
        if off is None and not prefixes:
            off = (
                "it has no special token to split at" if not specials else "no plain special token"
            )
        self.off = off
        self.max_bytes = max_bytes
        self._encode = encode
        self._sentinel = prefixes[0] if prefixes else ""
        self._specials: dict[str, Ids] = {t: (i,) for t, i in specials.items()}
        self._lstrip = frozenset(lstrip)
        self._rstrip = frozenset(rstrip)
        self._opaque = bool(opaque)
        self._patterns = [] if off else _patterns([*specials, *opaque])
        self._table: OrderedDict[Key, Ids] = OrderedDict()
        self._integers: list[int] = []
        self._growing = threading.Lock()
        self._hits = self._misses = self._bytes = 0

    @property
    def stats(self) -> CacheStats:
        """The counters now."""
        return CacheStats(self._hits, self._misses, self._bytes, len(self._table))

    def turn_off(self, reason: str) -> None:
        """Forget everything and tokenize whole prompts from now on."""
        self.off = reason
        self._table.clear()
        self._bytes = 0

    def plan(self, text: str, before: Ids = (), after: Ids = ()) -> Plan:
        """Split `text` and look its segments up; `before` and `after` surround the ids.

        Event-loop thread only.
        """
        if self.off is not None:
            return Plan(self, [before, (), after], {(text,): [1]}, len(text))
        pieces = self._split(text)
        parts = [before]
        new: dict[Key, list[int]] = {}
        if pieces[0]:
            self._look_up((pieces[0],), parts, new)
        specials = self._specials
        for token, segment in zip(pieces[1::2], pieces[2::2], strict=True):
            parts.append(specials[token])
            if segment:
                self._look_up(segment, parts, new)
        parts.append(after)
        missing = sum([len(key if isinstance(key, str) else key[0]) for key in new])
        return Plan(self, parts, new, missing)

    def _look_up(self, key: Key, parts: list[Ids], new: dict[Key, list[int]]) -> None:
        """Append the ids of a segment, or an empty place that `new` remembers."""
        ids = self._table.get(key)
        if ids is not None:
            self._table.move_to_end(key)
            self._hits += 1
            parts.append(ids)
            return
        places = new.get(key)
        if places is None:
            self._misses += 1
            places = new[key] = []
        places.append(len(parts))
        parts.append(())

    def _split(self, text: str) -> list[str]:
        """Return text, special token, text, special token … text; texts may be empty."""
        if len(self._patterns) == 1 and not self._opaque:
            pieces: list[str] = self._patterns[0].split(text, MAX_CUTS)
        else:
            pieces = [""]
            position = 0
            for match in islice(self._matches(text), MAX_CUTS):
                if match[0] in self._specials:
                    start, stop = match.span()
                    pieces[-1] = text[position:start]
                    pieces += (match[0], "")
                    position = stop
            pieces[-1] = text[position:]
        for i in range(1, len(pieces) if self._lstrip or self._rstrip else 0, 2):
            if pieces[i] in self._lstrip:
                pieces[i - 1] = pieces[i - 1].rstrip(WHITESPACE)
            if pieces[i] in self._rstrip:
                pieces[i + 1] = pieces[i + 1].lstrip(WHITESPACE)
        return pieces

    def _matches(self, text: str) -> Iterator[re.Match[str]]:
        return merge(*(pattern.finditer(text) for pattern in self._patterns), key=re.Match.start)

    def tokenize(self, key: Key) -> Ids:
        """Return the ids of one segment, their integers shared with every other."""
        if isinstance(key, tuple):
            ids = self._encode(key[0])
        else:
            ids = self._encode(self._sentinel + key)
            del ids[0]
        return tuple(ids) if self.off is not None else self._shared(ids)

    def _shared(self, ids: list[int]) -> Ids:
        """Return equal integers out of one table: 8 bytes each instead of 40.

        An `array` would take 4, but 20 ns per id to make a list of again (this: 2 ns), which a
        long conversation would pay on every turn. Measured with 340,000 ids.
        """
        if len(ids) < 2:
            return tuple(ids)  # itemgetter would return the bare integer
        get = operator.itemgetter(*ids)
        try:
            shared: Ids = get(self._integers)
        except IndexError:
            with self._growing:  # the loop and a thread may both get here
                self._integers.extend(range(len(self._integers), max(ids) + 1))
            shared = get(self._integers)
        return shared

    def store(self, segments: Sequence[tuple[Key, Ids]]) -> None:
        """Remember segments and drop the least recently used ones that no longer fit."""
        if self.off is not None:
            return
        table = self._table
        for key, ids in segments:
            size = _size(key, ids)
            if key not in table and size * LARGEST_SHARE <= self.max_bytes:
                table[key] = ids
                self._bytes += size
        while self._bytes > self.max_bytes:
            self._bytes -= _size(*table.popitem(last=False))

    def check(
        self, plain: Callable[[str], list[int]], texts: Iterable[str], seconds: float
    ) -> str | None:
        """Compare with `plain` on `texts`; returns the first text that differs, None if none does.

        Stops after `seconds`, but not before the first comparison. Leaves the cache empty.
        """
        deadline = time.monotonic() + seconds
        wrong = None
        for text in texts:
            plan = self.plan(text)
            ids = plan.encode()
            plan.commit()
            if ids != plain(text):
                wrong = text
                break
            if time.monotonic() > deadline:
                break
        self._table.clear()
        self._hits = self._misses = self._bytes = 0
        return wrong


def _size(key: Key, ids: Ids) -> int:
    text = key if isinstance(key, str) else key[0]
    return sys.getsizeof(text) + sys.getsizeof(ids) + ENTRY_BYTES


def _patterns(tokens: Collection[str]) -> list[re.Pattern[str]]:
    """One pattern per first character, or one for all if tokens of two groups can overlap.

    `re` searches for a literal prefix with memchr: 0.3 ms for 450 kB against 2.8 ms for a pattern
    that can start in two ways. Longest first is leftmost-longest, as the Rust side matches.
    """
    groups: dict[str, list[str]] = {}
    for token in sorted(tokens, key=len, reverse=True):
        groups.setdefault(token[0], []).append(token)
    if len(groups) > 4 or any(overlap(a, b) for a in tokens for b in tokens if a[0] != b[0]):
        groups = {"": sorted(tokens, key=len, reverse=True)}
    return [re.compile(f"({'|'.join(map(re.escape, group))})") for group in groups.values()]
