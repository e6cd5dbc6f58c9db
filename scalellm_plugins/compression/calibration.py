"""Calibration text: what layers and channels are chosen by, and what quality is measured on.

Never on the same text: every fifth row is held out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from scalellm_plugins.errors import ConfigError

WINDOW = 512
"""Tokens of a row at most."""

HELD_OUT_EVERY = 5
FEWEST_ROWS = 10

Row = list[int]


class Text(msgspec.Struct, frozen=True):
    """Token ids. Rows are independent documents, or windows of one text."""

    chosen_by: list[Row]
    held_out: list[Row]


def digest_of(path: Path) -> str:
    """SHA-256 of the file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"--calibration {path} cannot be read: {error}") from None


def load(path: Path, tokenizer: Any, tokens: int) -> Text:
    """Tokenize a file: `.jsonl` has {"messages": […]} or {"text": "…"} on each line, anything else
    is one text, in which the tokenizer's special tokens may be written.

    Args:
        tokenizer: transformers' tokenizer of the model.
        tokens: how many to choose by; a quarter as many are held out.

    Raises:
        ConfigError: a line is wrong, or there is too little text.
    """
    rows = list(_rows(path, tokenizer))
    if len(rows) < FEWEST_ROWS:
        raise ConfigError(
            f"--calibration {path}: {sum(map(len, rows))} tokens in {len(rows)} rows are too few; "
            f"at least {FEWEST_ROWS} documents, or {FEWEST_ROWS * 64} tokens of text, are needed"
        )
    held_out = rows[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    others = [row for place, row in enumerate(rows, 1) if place % HELD_OUT_EVERY]
    return Text(_first(others, tokens), _first(held_out, max(tokens // 4, 1)))


def _rows(path: Path, tokenizer: Any) -> Iterator[Row]:
    text = path.read_text(errors="replace")
    if path.suffix != ".jsonl":
        ids = tokenizer(text)["input_ids"]
        yield from _windows(ids, max(64, min(WINDOW, len(ids) // FEWEST_ROWS)))
        return
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            yield from _windows(_document(json.loads(line), tokenizer), WINDOW)
        except Exception as error:  # a chat template raises whatever it likes
            raise ConfigError(f"--calibration {path}, document {number}: {error}") from None


def _document(document: Any, tokenizer: Any) -> Row:
    if "messages" not in document:
        return list(tokenizer(document["text"])["input_ids"])
    text = tokenizer.apply_chat_template(document["messages"], tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _windows(ids: Sequence[int], size: int) -> Iterator[Row]:
    for start in range(0, len(ids), size):
        row = list(ids[start : start + size])
        if len(row) > 1:  # nothing is predicted in a row of one token
            yield row


def _first(rows: Sequence[Row], tokens: int) -> list[Row]:
    """Rows from the beginning, until there are so many tokens."""
    found, total = [], 0
    for row in rows:
        if total >= tokens:
            break
        found.append(row)
        total += len(row)
    return found
