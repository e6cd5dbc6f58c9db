"""Token id to bytes, as tables: the tokens of a byte-level tokenizer, and JSON's escaping.

The ByteLevel decoder concatenates the tokens' bytes and reads them as UTF-8, with U+FFFD for what
is none; so each token has bytes of its own, whatever stands beside it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

logger = logging.getLogger("vllm.scalellm")  # below "vllm": its handlers and its level

_LARGEST_ID = 2**32 - 1
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # bytes of UTF-8

_encode = msgspec.json.Encoder().encode
_needs_no_escape = re.compile(rb"[ !#-\[\]-\x7f]*").fullmatch


def escape(text: str) -> bytes:
    r"""Return `text` as it stands inside a JSON string literal, in UTF-8, without the quotes.

    Escaped are `"`, `\` and U+0000 to U+001F, as serde and msgspec do it; nothing else.
    """
    return _encode(text)[1:-1]


class View(NamedTuple):
    """A table with special tokens skipped or kept. Both lists are indexed by token id."""

    raw: list[bytes]
    """The bytes that a token stands for."""
    ready: list[bytes | None]
    """What `feed_json` returns where no character is pending; None if the token leaves one so."""

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of any id: none for one that the tokenizer does not have."""
        if 0 <= token_id < len(self.raw):
            return self.raw[token_id]
        if not 0 <= token_id <= _LARGEST_ID:
            report_invalid(token_id)
        return b""

    def ends_unfinished(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the prompt's text ends with U+FFFD, or an id there is none at all."""
        tail = b""
        for token_id in reversed(prompt_ids):
            if not 0 <= token_id <= _LARGEST_ID:
                return True
            tail = self.bytes_of(token_id) + tail
            if len(tail) >= _LONGEST_CHARACTER:
                break
        return ends_unfinished(tail)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` up to the last token that leaves no character unfinished."""
        if ids and min(ids) >= 0 and max(ids) < len(self.raw):
            pieces = list(map(self.raw.__getitem__, ids))
        else:
            pieces = list(map(self.bytes_of, ids))
        data = b"".join(pieces)
        if ends_unfinished(data):
            pieces = [piece for piece in pieces if piece]
            while pieces and ends_unfinished(b"".join(pieces[-_LONGEST_CHARACTER:])):
                pieces.pop()
            data = b"".join(pieces)
        return data.decode("utf-8", "replace")


class TokenTable:
    """The bytes of every token of a byte-level tokenizer. `size` is the largest id plus one."""

    def __init__(self, backend: Any, size: int) -> None:
        self.size = size
        special = {token.content for token in added_tokens(backend).values() if token.special}
        tokens = [backend.id_to_token(token_id) for token_id in range(size)]
        self._special = [token_id for token_id, token in enumerate(tokens) if token in special]
        raw = [b"" if token is None else _bytes_of(token) for token in tokens]
        self._kept = View(raw, [_ready(piece) for piece in raw])
        self._skipped: View | None = None

    def view(self, skip_special_tokens: bool) -> View:
        """Return the table for requests that skip special tokens (the default) or keep them."""
        if not skip_special_tokens:
            return self._kept
        if self._skipped is None:
            self._skipped = View(list(self._kept.raw), list(self._kept.ready))
            for token_id in self._special:
                self._skipped.raw[token_id] = self._skipped.ready[token_id] = b""
        return self._skipped


def report_invalid(token_id: object) -> None:
    """Log an id that is no 32-bit number, as vLLM does; its text is empty."""
    logger.error("Token id %r is not one: its text is left out", token_id)


def added_tokens(backend: Any) -> dict[int, Any]:
    """Return {token id: tokenizers.AddedToken}, special tokens and others."""
    added: dict[int, Any] = backend.get_added_tokens_decoder()
    return added


def ends_unfinished(data: bytes) -> bool:
    """Whether the text of `data` ends with U+FFFD: its last character may yet be completed.

    The last four bytes tell: a byte that is no continuation always begins anew, and a character
    has three continuations at most.
    """
    # A slice and a decode cost more than the look at one byte that settles nearly every token.
    if not data or data[-1] < 0x80:
        return False
    return data[-_LONGEST_CHARACTER:].decode("utf-8", "replace").endswith(_UNFINISHED)


class _ByteOfCharacter(dict[int, int]):
    """For `str.translate`: the byte that a character of the byte-level alphabet stands for.

    GPT-2's: printable Latin-1 stands for itself, the other bytes for U+0100 onwards, in order.
    """

    def __init__(self) -> None:
        printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        others = [byte for byte in range(0x100) if byte not in printable]
        super().__init__({byte: byte for byte in printable})
        self.update({0x100 + rank: byte for rank, byte in enumerate(others)})

    def __missing__(self, character: int) -> int:
        return 0x100  # not Latin-1: makes the encoding fail


_byte_of_character = _ByteOfCharacter()


def _bytes_of(token: str) -> bytes:
    """Return what the ByteLevel decoder makes of a token.

    A token with a character outside the alphabet (an added one: "<|user said|>") is itself.
    """
    try:
        return token.translate(_byte_of_character).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def _ready(raw: bytes) -> bytes | None:
    """Return an entry of `View.ready`."""
    if _needs_no_escape(raw):
        return raw  # the same object: most of the table's memory is shared so
    if ends_unfinished(raw):
        return None
    escaped = escape(raw.decode("utf-8", "replace"))
    return raw if escaped == raw else escaped
