"""Policies side by side, as text and as JSON. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .job import Record, Request, Run

Figures = Mapping[str, Any]
Column = Sequence[str]

_LATENCIES = (("queue ms", "queue"), ("TTFT ms", "ttft"), ("TPOT ms", "tpot"), ("E2E ms", "e2e"))
_PERCENTILES = ("p50", "p90", "p99")


def table(results: Mapping[str, Figures]) -> str:
    """Return tables of the figures of several policies, by label, a column each."""
    parts = [_grid("", results, _rows(results))]
    first = next(iter(results.values()))
    if "tenants" in first:
        parts.append(_grid("fairness", results, _fairness_rows()))
        for name in first["tenants"]:
            mine = {label: figures["tenants"][name] for label, figures in results.items()}
            weight = first["tenants"][name]["weight"]
            parts.append(_grid(f"tenant {name} (weight {weight:g})", mine, _tenant_rows(mine)))
    return "\n\n".join(parts)


Row = tuple[str, Callable[[Figures], str]]


def _rows(results: Mapping[str, Figures]) -> list[Row]:
    rows: list[Row] = [("requests", lambda f: f"{f['requests']:,}")]
    rows += _outcome_rows(results)
    rows += _latency_rows()
    rows += _target_rows(results)
    rows += [
        ("output tok/s", lambda f: f"{f['output_tok_s']:,.0f}"),
        ("prompt tok/s", lambda f: f"{f['prompt_tok_s']:,.0f}"),
        ("preemptions", lambda f: f"{f['preemptions']:,}"),
        ("KV in use, mean / max", lambda f: f"{f['kv_mean']:.1%} / {f['kv_max']:.1%}"),
        ("GPU busy", lambda f: f"{f['gpu_busy']:.1%}"),
        ("steps", lambda f: f"{f['steps']:,}"),
        ("last answer at s", lambda f: f"{f['seconds']:,.1f}"),
    ]
    return rows


def _outcome_rows(results: Mapping[str, Figures]) -> list[Row]:
    # A row only where there is something to say.
    def row(name: str) -> Row:
        return name, lambda f: f"{f[name]:,}"

    some = [n for n in ("dropped", "refused", "failed") if any(f[n] for f in results.values())]
    return [row(name) for name in some]


def _latency_rows() -> list[Row]:
    def row(name: str, key: str) -> Row:
        def text(figures: Figures) -> str:
            found = figures[key]
            if found is None:
                return "–"
            return " / ".join(_ms(found[share]) for share in _PERCENTILES)

        return f"{name} {' / '.join(_PERCENTILES)}", text

    return [row(name, key) for name, key in _LATENCIES]


def _target_rows(results: Mapping[str, Figures]) -> list[Row]:
    if all(figures["attainment"] is None for figures in results.values()):
        return []
    return [
        ("within targets", lambda f: f"{f['attainment']:.1%}"),
        ("goodput req/s", lambda f: f"{f['goodput_req_s']:.2f}"),
        ("goodput tok/s", lambda f: f"{f['goodput_tok_s']:,.0f}"),
    ]


def _tenant_rows(mine: Mapping[str, Figures]) -> list[Row]:
    rows: list[Row] = [("requests", lambda f: f"{f['requests']:,}")]
    rows += _outcome_rows(mine)
    rows += _latency_rows()
    rows += _target_rows(mine)
    rows += [
        ("service: weighted tokens / weight", lambda f: f"{f['service']:,.0f}"),
        ("output tok/s", lambda f: f"{f['output_tok_s']:,.0f}"),
        ("preemptions", lambda f: f"{f['preemptions']:,}"),
    ]
    return rows


def _fairness_rows() -> list[Row]:
    def gap(figures: Figures) -> str:
        found = figures["fairness"]
        if found["gap"] is None:
            return "never two waited"
        return f"{found['gap']:,.0f} ({' – '.join(found['between'])})"

    return [
        ("largest gap in service while both wait", gap),
        ("bound of virtual token counters", lambda f: f"{f['fairness']['bound']:,.0f}"),
    ]


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _grid(title: str, results: Mapping[str, Figures], rows: Sequence[Row]) -> str:
    lines = [[title, *results]]
    lines += [[name, *(text(figures) for figures in results.values())] for name, text in rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return "  ".join(aligned).rstrip()


def document(
    command: str,
    requests: Sequence[Request],
    runs: Mapping[str, Run],
    results: Mapping[str, Figures],
    *,
    each: bool = False,
) -> dict[str, Any]:
    """Return all of it as JSON's types; `each`: every request's times, too."""
    span = requests[-1].at
    return {
        "command": command,
        "workload": {
            "requests": len(requests),
            "tenants": sorted({request.tenant for request in requests}),
            "last_arrival_s": round(span, 4),
            "prompt_tokens": sum(request.prompt for request in requests),
            "output_tokens": sum(request.output for request in requests),
        },
        "policies": {
            label: {
                "engine": _plain(run.engine),
                **results[label],
                "series": _series(run),
                **({"each": _each(requests, run.records)} if each else {}),
            }
            for label, run in runs.items()
        },
    }


def _plain(struct: Any) -> Any:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def _series(run: Run) -> dict[str, Any]:
    """Columns over time."""
    samples = run.samples
    columns: dict[str, Any] = {
        "at_s": [round(one.at, 4) for one in samples],
        "waiting": [one.waiting for one in samples],
        "running": [one.running for one in samples],
        "kv": [round(one.kv, 5) for one in samples],
    }
    if len(run.tenants) > 1:
        columns["served"] = {
            name: [one.served[place] for one in samples] for place, name in enumerate(run.tenants)
        }
    return columns


def _each(requests: Sequence[Request], records: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {"at": request.at, "tenant": request.tenant, "prompt": request.prompt, **_plain(record)}
        for request, record in zip(requests, records, strict=True)
    ]
