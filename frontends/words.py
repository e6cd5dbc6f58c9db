"""Token ids by word: text that was never seen is made of words that were.

A prompt's segments are remembered whole (`segments.py`), but most prompts are new, and tokenizing
128 tokens of new text cost 270-320 µs of a request's 850-1,100 in a server: 75 in a loop, the rest
is memory that other processes have pushed out of the caches meanwhile. The pre-tokenizers of GPT-2,
Llama 3, Qwen and their kin always split before a space that follows something else than whitespace,
and every piece is merged alone. So the ids of " garden" are the same wherever it stands, and a text
is a list of look-ups: 14 µs in a loop, 50-90 in a server.

Not assumed but read from the tokenizer (`boundary_splits`) and compared with it (`check`). Pure:
knows the `tokenizers` library by what it is handed only.
"""

from __future__ import annotations

import json
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate, chain
from typing import Any

Ids = tuple[int, ...]
# A word of the text without the space before it; in a tuple if nothing is before it.
Word = str | tuple[str]

LONGEST_TEXT = 8192
"""Characters. Longer text is tokenized in a thread, by the library, which lets go of the GIL."""
LONGEST_WORD = 48
MOST_WORDS = 32_768
"""Then the table begins anew. About 220 bytes each, so 7 MB."""

CHECK_TEXTS = 300

_odd = re.compile(r"\s ").search
"""A space after whitespace: no boundary, or not for sure. Python's \\s is Unicode's White_Space and
a few more, which does no harm."""

_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_ALTERNATIVES = frozenset(
    {
        *_CONTRACTIONS,
        _ANY_CASE,
        *_CASED,
        *(cased + _ANY_CASE + "?" for cased in _CASED),
        *(r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+"),
        *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}", r"\p{N}{1,3}"),
        *(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
        *(r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
    }
)
"""What the patterns of GPT-2, cl100k (Llama 3, Qwen), o200k and Tekken consist of. Each matches a
space as its first character, or in whitespace that it starts with, or not at all; none looks back,
and what looks ahead looks from whitespace only."""


class Words:
    """Text to ids, as `encode` does it, for text between special tokens.

    Args:
        encode: the tokenizer, a pure function.
        rust: the `tokenizers.Tokenizer` itself, for the places of ids in a text.
    """

    def __init__(self, encode: Callable[[str], list[int]], rust: Any) -> None:
        self._encode = encode
        self._rust = rust
        self._table: dict[Word, Ids] = {}

    def __len__(self) -> int:
        return len(self._table)

    def __call__(self, text: str) -> list[int]:
        """Return the ids of `text`. Any thread; the table is one dictionary."""
        if len(text) > LONGEST_TEXT or _odd(text):
            return self._encode(text)
        words: list[Word] = text.split(" ")  # type: ignore[assignment]
        words[0] = (text[: len(words[0])],)
        table = self._table
        try:
            return list(chain.from_iterable([table[word] for word in words]))
        except KeyError:
            new = self._learn(table, words)
            known = [new[word] if word in new else table[word] for word in words]
            return list(chain.from_iterable(known))

    def _learn(self, table: dict[Word, Ids], words: list[Word]) -> dict[Word, Ids]:
        """Tokenize the words that are not in the table, together; remember and return them."""
        missing = [word for word in dict.fromkeys(words) if word not in table]
        # The first of the text comes first here, too, and what starts with a space may.
        pieces = [word[0] if isinstance(word, tuple) else " " + word for word in missing]
        encoding = self._rust.encode("".join(pieces), add_special_tokens=False)
        ids = encoding.ids
        starts = [start for start, _ in encoding.offsets]
        edges = [bisect_left(starts, end) for end in accumulate(map(len, pieces))]
        edges[-1] = len(ids)  # of a space at the end the library may say that it is empty
        learnt = {
            word: tuple(ids[begin:end])
            for word, begin, end in zip(missing, [0, *edges], edges, strict=False)
        }
        if len(table) + len(learnt) > MOST_WORDS:
            self._table = {}
        self._table.update(
            (word, known)
            for (word, known), piece in zip(learnt.items(), pieces, strict=True)
            if len(piece) <= LONGEST_WORD
        )
        return learnt

    def check(self, rng: random.Random, fragments: Iterable[str]) -> str | None:
        """Compare with the tokenizer on random texts; returns the first that differs.

        Every text is asked for twice: its words are learnt, then looked up. Leaves nothing behind.
        """
        parts = [fragment for fragment in fragments if fragment and " " not in fragment]
        wrong = None
        for _ in range(CHECK_TEXTS):
            text = " ".join(
                "".join(rng.choice(parts) for _ in range(rng.randint(1, 3)))
                for _ in range(rng.randint(1, 8))
            )
            text = rng.choice(("", "", " ")) + text + rng.choice(("", "", " "))
            right = self._encode(text)
            if self(text) != right or self(text) != right:
                wrong = text
                break
        self._table = {}
        return wrong


def boundary_splits(rust: Any) -> bool:
    """Whether a `tokenizers.Tokenizer` always splits before a space that follows no whitespace."""
    try:
        state = json.loads(rust.to_str())
    except Exception:  # parts written in Python cannot be serialized
        return False
    return (
        state["model"]["type"] == "BPE"
        and not state["model"]["dropout"]
        # Composes characters, but none with a space.
        and (state["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        and _all_split(state["pre_tokenizer"])
        # None that is matched across the boundary, or looks at the other side of it.
        and not any(
            " " in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"]
            for token in state["added_tokens"]
        )
    )


def _all_split(step: Any) -> bool:
    """Whether one of the steps of a pre-tokenizer splits there, and the others do not mind."""
    steps = step["pretokenizers"] if step and step["type"] == "Sequence" else [step]
    kinds = [_kind(one) for one in steps]
    return None not in kinds and "splits" in kinds


def _kind(step: Any) -> str | None:
    """Of a step: "splits" at every boundary, "single" looks at single characters; else None."""
    if step is None:
        return None
    if step["type"] == "ByteLevel":
        return None if step["add_prefix_space"] else "splits" if step["use_regex"] else "single"
    if step["type"] == "Digits":
        return "single"
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"]:
        return None
    pattern = step["pattern"].get("Regex", "")
    if re.fullmatch(r"\[[^\\\]\[^ ]+\]", pattern) and not re.fullmatch(pattern, " "):
        return "single"
    alternatives = set(_alternatives(pattern))
    return "splits" if r"\s+" in alternatives and alternatives <= _ALTERNATIVES else None


def _alternatives(pattern: str) -> list[str]:
    """Split a pattern at its top-level "|"."""
    found = [""]
    depth = 0
    for character in pattern:
        depth += (character in "([") - (character in ")]")
        if character == "|" and not depth:
            found.append("")
        else:
            found[-1] += character
    return found
