"""From samples (one cell, one system, one round) to records, a table, JSON and a picture."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

Sample = dict[str, Any]
Record = dict[str, Any]

KEY = ("system", "workload", "stream", "streams")
MEDIANS = (
    "output_tok_s",
    "ideal_fraction",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "itl_p50_ms",
    "itl_p99_ms",
    "tpot_p50_ms",
    "tpot_p99_ms",
    "e2e_p50_ms",
    "e2e_p99_ms",
    "tokens_per_event",
    "prompt_tokens",
    "other_cores",
    "idle_cores",
)
"""Fields of a record that are the median over the rounds; None where no round has a value."""
ROLES = ("frontend", "engine", "client")


def aggregate(samples: Iterable[Sample]) -> list[Record]:
    """Return one record per system and cell, in the order in which they first appear.

    Values are medians over the rounds that were measured; peak memory is the highest and failures
    are added up over all rounds. A record whose every round failed has None for what was not
    measured and says why in `error`.
    """
    groups: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample[key] for key in KEY), []).append(sample)
    return [_record(rounds) for rounds in groups.values()]


def _record(rounds: Sequence[Sample]) -> Record:
    speeds = _values(rounds, "output_tok_s")
    errors = [sample["error"] for sample in rounds if sample.get("error")]
    return {
        **{key: rounds[0][key] for key in KEY},
        **{field: _median(_values(rounds, field)) for field in MEDIANS},
        "ideal_tok_s": rounds[0].get("ideal_tok_s"),
        "cpu_us_per_token": {
            role: _median(
                [s["cpu_us_per_token"][role] for s in rounds if s.get("cpu_us_per_token")]
            )
            for role in ROLES
        },
        "rss_peak_mb": max(_values(rounds, "rss_peak_mb"), default=None),
        "pss_mb": max(_values(rounds, "pss_mb"), default=None),
        "failed": sum(sample.get("failed") or 0 for sample in rounds),
        "rounds": len(speeds),
        "output_tok_s_range": [min(speeds), max(speeds)] if speeds else None,
        "error": errors[0] if errors else None,
    }


def _values(rounds: Sequence[Sample], field: str) -> list[float]:
    return [sample[field] for sample in rounds if sample.get(field) is not None]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def save(
    path: Path,
    records: Sequence[Record],
    samples: Sequence[Sample],
    command: str,
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> None:
    """Write the JSON file. `samples` are the single rounds, for whoever doubts the medians."""
    document = {
        "machine": machine(),
        "versions": dict(versions),
        "command": command,
        "settings": dict(settings),
        "records": list(records),
        "samples": list(samples),
    }
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)


def machine() -> dict[str, Any]:
    """What the measurements were made on."""
    info = Path("/proc/cpuinfo").read_text()
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if "model name" in line]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(pages / 1e9, 1),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    """Versions of what takes part, as far as it is installed."""
    names = ("scalellm-plugins", "vllm", "torch", "uvicorn", "uvloop", "msgspec")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


_COLUMNS = (
    ("system", 10),
    ("tok/s", 7),
    ("±%", 4),
    ("%ideal", 6),
    ("TTFT p50", 8),
    ("p99", 7),
    ("ITL p50", 7),
    ("p99", 6),
    ("tok/ev", 6),
    ("E2E p50", 7),
    ("p99", 7),
    ("frontend", 8),
    ("engine", 6),
    ("client", 6),
    ("RSS MB", 6),
    ("failed", 6),
)


def table(records: Sequence[Record], summaries: Mapping[str, str]) -> str:
    """Return the records as text: a block for each load, a line for each system."""
    width = max([_COLUMNS[0][1], *(len(record["system"]) for record in records)])
    widths = [width, *(size for _, size in _COLUMNS[1:])]
    head = _line([name for name, _ in _COLUMNS], widths)
    lines = [
        "times in ms; frontend, engine, client: CPU µs per output token; RSS: sum of the peaks;",
        "tok/ev: tokens per SSE event (above 1 a frontend that falls behind merges them)",
    ]
    order = sorted(records, key=lambda r: (r["workload"], not r["stream"], r["streams"]))
    for (workload, stream, streams), block in groupby(
        order, key=lambda r: (r["workload"], r["stream"], r["streams"])
    ):
        rows = list(block)
        mode = "streaming" if stream else "not streaming"
        ideal = rows[0].get("ideal_tok_s")
        ideal_text = f", ideal {ideal:,.0f} tok/s" if ideal else ""
        about = summaries.get(workload, "")
        lines += ["", f"{workload} ({about}), {mode}, {streams} streams{ideal_text}", head]
        for record in rows:
            lines.append(_line(_cells(record), widths))
            if record["error"]:
                lines.append(f"  ! {record['error'].splitlines()[0]}")
    return "\n".join(lines)


def _cells(record: Record) -> list[str]:
    fraction = record["ideal_fraction"]
    spread = record["output_tok_s_range"]
    half = (spread[1] - spread[0]) / 2 / record["output_tok_s"] if spread and spread[0] else None
    cpu = record["cpu_us_per_token"]
    return [
        record["system"],
        _number(record["output_tok_s"], 0),
        _number(None if half is None or record["rounds"] < 2 else half * 100, 1),
        _number(None if fraction is None else fraction * 100, 1),
        *(_number(record[f"ttft_p{share}_ms"], 1) for share in (50, 99)),
        *(_number(record[f"itl_p{share}_ms"], 2) for share in (50, 99)),
        _number(record["tokens_per_event"], 2),
        *(_number(record[f"e2e_p{share}_ms"], 0) for share in (50, 99)),
        *(_number(cpu[role], 1) for role in ROLES),
        _number(record["rss_peak_mb"], 0),
        str(record["failed"]),
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return first[0].ljust(first[1]) + "".join(f" {cell:>{width}}" for cell, width in rest)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
