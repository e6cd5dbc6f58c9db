"""Recorded traffic: when requests came and how long they were, from a CSV file. Pure.

Two public formats, told apart by their header:

    TIMESTAMP,ContextTokens,GeneratedTokens     Azure LLM inference traces, 2023 and 2024
    Timestamp,…,Request tokens,Response tokens  BurstGPT (arXiv 2401.17644), any release

Azure's times are dates, BurstGPT's seconds. The first row is at 0 s. Rows without a prompt or an
answer (BurstGPT's failures are such) are left out and counted.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from scalellm_plugins.errors import ConfigError

OPTION = "--trace"


class Row(NamedTuple):
    """One request: seconds since the first, and tokens."""

    at: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Trace:
    """The rows of a file in order of time."""

    format: str
    rows: list[Row]
    left_out: int
    """Rows without a prompt or an answer."""


class _Format(NamedTuple):
    name: str
    at: str
    prompt: str
    output: str
    seconds: Callable[[str], float]


def _date(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


_FORMATS = (
    _Format("azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens", _date),
    _Format("burstgpt", "Timestamp", "Request tokens", "Response tokens", float),
)


def load(path: str | Path, *, seconds: float | None = None, speed: float = 1.0) -> Trace:
    """Read a trace: its first `seconds` (of the simulation's time), `speed` times as fast.

    Raises:
        ConfigError: no such file, an unknown header (the text names the missing column), a value
            that is none (the text names the line), or no usable row.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            return parse(file, str(path), seconds=seconds, speed=speed)
    except OSError as error:
        raise ConfigError(f"{OPTION}: {str(path)!r}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{OPTION}: {str(path)!r} is not a CSV file: {error}") from None


def parse(
    lines: Iterable[str], name: str, *, seconds: float | None = None, speed: float = 1.0
) -> Trace:
    """As `load`, from lines; `name` is for error messages."""
    reader = csv.reader(lines)
    header = [column.strip() for column in next(reader, [])]
    form = _format(header, name)
    places = [header.index(column) for column in (form.at, form.prompt, form.output)]
    rows: list[Row] = []
    left_out = 0
    for row in _rows(reader, form, places, name):
        if row.prompt < 1 or row.output < 1:
            left_out += 1
        else:
            rows.append(row)
    rows.sort(key=lambda row: row.at)
    if not rows:
        raise ConfigError(f"{OPTION}: {name!r} holds no request with a prompt and an answer")
    start = rows[0].at
    rows = [row._replace(at=(row.at - start) / speed) for row in rows]
    if seconds is not None:
        rows = [row for row in rows if row.at < seconds]
    return Trace(form.name, rows, left_out)


def _format(header: list[str], name: str) -> _Format:
    # The one of which the most columns are there.
    def missing(form: _Format) -> list[str]:
        return [column for column in (form.at, form.prompt, form.output) if column not in header]

    form = min(_FORMATS, key=lambda form: len(missing(form)))
    lacking = missing(form)
    if not lacking:
        return form
    if len(lacking) == 3:
        known = "; ".join(f"{f.name}: {f.at}, {f.prompt}, {f.output}" for f in _FORMATS)
        raise ConfigError(
            f"{OPTION}: {name!r} has none of the columns of a known format. Its header: "
            f"{', '.join(header) or 'empty'}. Known: {known}"
        )
    raise ConfigError(
        f"{OPTION}: {name!r} lacks the column {' and '.join(map(repr, lacking))} of format "
        f"{form.name}. Its header: {', '.join(header)}"
    )


def _rows(
    reader: Iterator[list[str]], form: _Format, places: list[int], name: str
) -> Iterator[Row]:
    for number, cells in enumerate(reader, 2):
        if not any(cells):
            continue
        try:
            at, prompt, output = (cells[place].strip() for place in places)
            yield Row(form.seconds(at), int(float(prompt)), int(float(output)))
        except (ValueError, IndexError, OverflowError):
            raise ConfigError(
                f"{OPTION}: {name!r}, line {number}: {','.join(cells)!r} is not a time and two "
                f"numbers of tokens in columns {form.at}, {form.prompt}, {form.output}"
            ) from None
