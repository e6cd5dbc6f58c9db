"""The tokens that a simulated model says: deterministic, ordinary words, never a special token.

The token at a position is a function of the prompt and the position alone, so that a request which
is preempted and recomputed, or asked again, gets the same text. Words begin with their own space
where the vocabulary has such, so that the text of an answer is tokenized back to the same tokens
and the next turn of a conversation finds them in the prefix cache.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SIZE = 4096
"""Entries of the table: a power of two, so that wrapping around is a bitwise and."""

MASK = SIZE - 1

_SPACES = ("Ġ", "▁")
"""How byte-level BPE and SentencePiece write a leading space."""


def word_ids(vocabulary: dict[str, int]) -> list[int]:
    """Ids of the lower-case ASCII words of `vocabulary`, those with a leading space if there are
    enough to make varied text.
    """
    spaced = [id_ for token, id_ in vocabulary.items() if _is_word(token[1:], token[:1])]
    if len(spaced) >= 16:
        return sorted(spaced)
    return sorted(id_ for token, id_ in vocabulary.items() if _is_word(token, "Ġ"))


def _is_word(letters: str, space: str) -> bool:
    return space in _SPACES and letters.isascii() and letters.isalpha() and letters.islower()


def vocabulary_of(directory: str | Path) -> dict[str, int]:
    """The vocabulary in a `tokenizer.json`, without its added (special) tokens; empty if there is
    no such file or it holds another kind of model.
    """
    try:
        text = (Path(directory) / "tokenizer.json").read_text(encoding="utf-8")
        parsed: dict[str, Any] = json.loads(text)
    except (OSError, ValueError):
        return {}
    vocabulary = parsed.get("model", {}).get("vocab")
    if isinstance(vocabulary, list):  # Unigram: [token, score] in order of id
        vocabulary = {entry[0]: id_ for id_, entry in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict):
        return {}
    special = {token.get("content") for token in parsed.get("added_tokens", ())}
    return {token: id_ for token, id_ in vocabulary.items() if token not in special}


def table(ids: Sequence[int], vocab_size: int, avoid: Iterable[int] = ()) -> list[int]:
    """`SIZE` token ids to say one after the other: `ids` shuffled by a fixed seed and repeated.

    Without `ids`, the middle half of the vocabulary stands in: special tokens are at its ends.
    """
    banned = set(avoid)
    usable = [id_ for id_ in ids if id_ < vocab_size and id_ not in banned]
    if not usable:
        middle = range(vocab_size // 4, max(vocab_size // 4 + 1, vocab_size * 3 // 4))
        usable = [id_ for id_ in middle if id_ not in banned] or [0]
    shuffled = random.Random(0).sample(usable, len(usable))
    return [shuffled[i % len(shuffled)] for i in range(SIZE)]


def seed_of(prompt: Sequence[int] | None) -> int:
    """Where in the table the answer to `prompt` starts. Looks at few tokens: prompts are long."""
    if not prompt:
        return 0
    return len(prompt) * 31 + prompt[0] * 7 + prompt[len(prompt) // 2] * 13 + prompt[-1] * 17
