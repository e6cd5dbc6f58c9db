"""Where a prompt may be split, as far as the added tokens decide it, and texts to check that with.

Facts about the `tokenizers` library (`AddedVocabulary`): added tokens with `normalized=False` are
matched on the raw text, leftmost and longest first; one that is "whole word only" also looks at its
neighbours, and `lstrip` and `rstrip` take whitespace with them. Every piece between two matches is
processed alone. Pure: no tokenizer here, only strings.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

# Unicode's White_Space, which is what the Rust side strips by. str.strip() without arguments also
# takes U+001C to U+001F.
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


def overlap(a: str, b: str) -> bool:
    """Whether an occurrence of `a` and a later or equal one of `b` can share characters."""
    if b in a:
        return True
    return b[0] in a and any(b.startswith(a[i:]) for i in range(1, len(a)))


@dataclass(frozen=True, slots=True)
class AddedToken:
    """An added token that the tokenizer matches on raw text, with its flags."""

    content: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True)
class Cuts:
    """Arguments of `SegmentCache`: where to split, and what must be matched beside it."""

    specials: Mapping[str, int]
    lstrip: frozenset[str]
    rstrip: frozenset[str]
    opaque: tuple[str, ...]


def choose_cuts(added: Collection[AddedToken], wanted: Callable[[str], bool]) -> Cuts:
    """Choose the tokens to split at: those `wanted` at which splitting is exact.

    Args:
        added: every added token that is matched on raw text (`normalized=False`).
        wanted: which of them occur between messages. Fewer split faster; every other token is
            left inside its segment for the tokenizer.
    """
    edges = any(a.content[0] in WHITESPACE or a.content[-1] in WHITESPACE for a in added)
    words = any(a.single_word for a in added)

    def exact(token: AddedToken) -> bool:
        first, last = token.content[0], token.content[-1]
        # Messages are full of whitespace: with a cut at every newline, segments would be lines.
        if token.single_word or first in WHITESPACE or last in WHITESPACE:
            return False
        # A token that swallows whitespace may swallow part of one that starts or ends with it.
        if (token.lstrip or token.rstrip) and edges:
            return False
        # "Whole word only" looks at the neighbour's last and first characters.
        return not (words and (_is_word(first) or _is_word(last)))

    cuts = [a for a in added if wanted(a.content) and exact(a)]
    chosen = {a.content for a in cuts}
    opaque = _overlapping(chosen, [a.content for a in added if a.content not in chosen])
    return Cuts(
        {a.content: a.id for a in cuts},
        frozenset(a.content for a in cuts if a.lstrip),
        frozenset(a.content for a in cuts if a.rstrip),
        tuple(opaque),
    )


def _is_word(character: str) -> bool:
    return re.match(r"\w", character) is not None


def _overlapping(chosen: Collection[str], others: Sequence[str]) -> list[str]:
    """Those of `others` that can overlap with a chosen token, or with one that can, and so on.

    Leftmost-longest matching is a chain: what overlaps with a match decides where the next starts.
    """
    relevant = list(chosen)
    found: list[str] = []
    rest = list(others)
    while relevant:
        hit = [o for o in rest if any(overlap(o, r) or overlap(r, o) for r in relevant)]
        rest = [o for o in rest if o not in hit]
        found += hit
        relevant = hit
    return found


_WORDS = "a Z é 中 한 🙂 👩‍🚀 ﬁ ß İ ａ 3.14159 2026 hello user don't x=1; _ ▁ Ġ"
_SIGNS = "< | > <| |> [ ] </ ... !? <<< ||| # - \\"
_SPACED = [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " world", "Hello World ", "e\u0301"]
_ODD = ["\u00a0", "\u3000", "\u2028", "\x85", "\u200b", "\x1c", "\x00"]
FRAGMENTS = [*_WORDS.split(), *_SIGNS.split(), *_SPACED, *_ODD]


def sample_texts(
    rng: random.Random, cuts: Sequence[str], tokens: Sequence[str], count: int
) -> list[str]:
    """Return random texts that try what splitting could get wrong.

    Args:
        cuts: tokens to split at, which every other fragment is.
        tokens: all added tokens; up to a hundred of them, and torn ones, are sprinkled in.
    """
    others = [*cuts, *rng.sample(tokens, min(len(tokens), 100))]
    torn = [token[:cut] for token in others for cut in (1, len(token) // 2, -1)]
    torn += [token[cut:] for token in others for cut in (1, len(token) // 2, -1)]
    pools: list[Sequence[str]] = [FRAGMENTS, FRAGMENTS, cuts, cuts, others, torn]
    pools = [pool for pool in pools if pool]
    texts = ["", *cuts, *(token + token for token in cuts), *(f" {token} x " for token in cuts)]
    while len(texts) < count:
        texts.append("".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 12))))
    return texts
