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

from . import interrupt

WINDOW = 512
"""Tokens of a row at most."""

HELD_OUT_EVERY = 5
FEWEST_ROWS = 10
EXPECTED = (
    'Each line of a .jsonl file is {"messages": [{"role": "user", "content": "…"}, …]} or '
    '{"text": "…"}'
)


class Row(msgspec.Struct, frozen=True):
    """Token ids, and which of them quality is measured on.

    In conversations those are what the assistant says: a chat model was never taught to say what
    users do, and the less it is trained on that, the more a worse model may look better there.
    """

    ids: list[int]
    scored: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


class Text(msgspec.Struct, frozen=True):
    """Rows are independent documents, or windows of one text."""

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
    if not any(any(row.scored[1:]) for row in held_out):
        raise ConfigError(f"--calibration {path}: in no held-out conversation the assistant speaks")
    others = [row for place, row in enumerate(rows, 1) if place % HELD_OUT_EVERY]
    return Text(_first(others, tokens), _first(held_out, max(tokens // 4, 1)))


def _rows(path: Path, tokenizer: Any) -> Iterator[Row]:
    text = path.read_text("utf-8", errors="replace")
    if path.suffix != ".jsonl":
        row = _plain(text, tokenizer)
        yield from _windows(row, max(64, min(WINDOW, len(row) // FEWEST_ROWS)))
        return
    # Not splitlines(): JSON strings may hold what it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield from _windows(_document(json.loads(line), tokenizer), WINDOW)
        except Exception as error:  # a chat template raises whatever it likes
            interrupt.check()
            said = (
                f"this is no JSON ({error})" if isinstance(error, json.JSONDecodeError) else error
            )
            raise ConfigError(f"--calibration {path}, line {number}: {said}. {EXPECTED}") from None


def _check_document(document: Any) -> None:
    """Raise TypeError, which says what it is instead."""
    if not isinstance(document, dict):
        raise TypeError(f"{_shown(document)} is no object")
    if "messages" not in document:
        if "text" not in document:
            raise TypeError(f"no 'messages' and no 'text' in {_shown(document)}")
        if not isinstance(document["text"], str):
            raise TypeError(f"'text' is {_shown(document['text'])}, no string")
        return
    messages = document["messages"]
    if not isinstance(messages, list) or not messages:
        raise TypeError(f"'messages' is {_shown(messages)}, no list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TypeError(f"{_shown(message)} is no message with a 'role'")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _document(document: Any, tokenizer: Any) -> Row:
    _check_document(document)
    if "messages" not in document:
        return _plain(document["text"], tokenizer)
    messages = document["messages"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    said = _said(messages, text, tokenizer)
    if not said or not tokenizer.is_fast:
        return _plain(text, tokenizer, add_special_tokens=False)
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    scored = [
        any(first <= start and end <= last for first, last in said)
        for start, end in made["offset_mapping"]
    ]
    return Row(list(made["input_ids"]), scored)


def _plain(text: str, tokenizer: Any, **options: Any) -> Row:
    # verbose: transformers warns of texts longer than the model takes, which are cut here.
    ids = list(tokenizer(text, verbose=False, **options)["input_ids"])
    return Row(ids, [True] * len(ids))


def _said(messages: Sequence[Any], text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Where in `text` the assistant's words are; nothing where the template does not say so."""
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(
            messages[:place], tokenize=False, add_generation_prompt=True
        )
        after = tokenizer.apply_chat_template(messages[: place + 1], tokenize=False)
        if not (text.startswith(after) and after.startswith(before)):
            return []  # a template that changes what came earlier
        spans.append((len(before), len(after)))
    return spans


def _windows(row: Row, size: int) -> Iterator[Row]:
    for start in range(0, len(row), size):
        part = slice(start, start + size)
        window = Row(row.ids[part], row.scored[part])
        if len(window) > 1:  # nothing is predicted in a row of one token
            yield window


def _first(rows: Sequence[Row], tokens: int) -> list[Row]:
    """Rows from the beginning, until there are so many tokens."""
    found, total = [], 0
    for row in rows:
        if total >= tokens:
            break
        found.append(row)
        total += len(row)
    return found
