"""The picture of a comparison: a row for each workload and mode, a column for each question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalellm_plugins.errors import ScaleLLMError

from .report import Record

_COLORS = ("#9aa5b1", "#647acb", "#e9a23b", "#2f855a", "#d64545", "#7c5295", "#3e9fbf", "#8a6d3b")


class PlotError(ScaleLLMError):
    """There is no matplotlib to draw with."""


def draw(path: Path, records: Sequence[Record], title: str) -> None:
    """Write the picture to `path` (PNG, or what the suffix says).

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise PlotError(
            "no picture: matplotlib is not installed. `pip install matplotlib`, then run again, "
            "or leave it: the table and the JSON file have everything."
        ) from None
    rows = sorted({(r["workload"], not r["stream"]) for r in records})
    figure, axes = pyplot.subplots(
        len(rows), 4, figsize=(19, 1.3 + 3.6 * len(rows)), squeeze=False, layout="constrained"
    )
    systems = list(dict.fromkeys(r["system"] for r in records))
    for line, (workload, unstreamed) in zip(axes, rows, strict=True):
        chosen = [r for r in records if (r["workload"], not r["stream"]) == (workload, unstreamed)]
        mode = "not streaming" if unstreamed else "streaming"
        _row(line, chosen, systems, f"{workload}, {mode}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _row(axes: Sequence[Any], records: list[Record], systems: list[str], name: str) -> None:
    speed, cpu, first, second = axes
    streams = sorted({r["streams"] for r in records})
    for axis in axes:
        axis.set_xticks(range(len(streams)), [f"{n} streams" for n in streams])
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    width = 0.8 / len(systems)
    ideals = {r["streams"]: r["ideal_tok_s"] for r in records if r.get("ideal_tok_s")}
    for place, count in enumerate(streams):
        if count in ideals:
            label = "ideal (no CPU cost)" if place == 0 else None
            speed.hlines(
                ideals[count], place - 0.43, place + 0.43, "black", linestyles="--", label=label
            )
    for number, system in enumerate(systems):
        color = _COLORS[number % len(_COLORS)]
        for record in (r for r in records if r["system"] == system):
            x = streams.index(record["streams"]) + (number - (len(systems) - 1) / 2) * width
            label = system if record["streams"] == streams[0] else None
            _speed_bar(speed, record, x, width, color, label)
            _cpu_bar(cpu, record, x, width, color)
            _latency_bar(first, record, "ttft" if record["stream"] else "e2e", x, width, color)
            _latency_bar(second, record, "itl", x, width, color)
    speed.set_ylabel(f"{name}\noutput tok/s")
    cpu.set_ylabel("CPU µs per output token\n(full: frontend, pale: EngineCore)")
    streamed = records[0]["stream"]
    first.set_ylabel(f"{'TTFT' if streamed else 'E2E latency'}, ms: bar p50, whisker p99")
    first.set_yscale("log")
    for which in (first.yaxis.set_major_formatter, first.yaxis.set_minor_formatter):
        which("{x:g}")
    first.tick_params(axis="y", which="both", labelsize=8)
    second.set_ylabel("ITL, ms: bar p50, whisker p99")
    if not streamed:
        second.set_visible(False)


def _speed_bar(axis: Any, record: Record, x: float, width: float, color: str, label: Any) -> None:
    value = record["output_tok_s"] or 0
    axis.bar(x, value, width * 0.92, color=color, label=label)
    spread = record["output_tok_s_range"]
    if spread and record["rounds"] > 1:
        axis.vlines(x, *spread, color="black", linewidth=1)
    fraction = record["ideal_fraction"]
    text = "failed" if not value else f"{fraction:.0%}" if fraction is not None else ""
    # Inside the bar, where the line of the ideal does not cross it.
    inside = {"va": "top", "color": "white"} if value else {"va": "bottom"}
    axis.text(x, value * 0.985, text, ha="center", fontsize=7, **inside)


def _cpu_bar(axis: Any, record: Record, x: float, width: float, color: str) -> None:
    frontend = record["cpu_us_per_token"]["frontend"] or 0
    engine = record["cpu_us_per_token"]["engine"] or 0
    axis.bar(x, frontend, width * 0.92, color=color)
    axis.bar(x, engine, width * 0.92, bottom=frontend, color=color, alpha=0.4)
    text = f"{frontend:.0f}+{engine:.0f}" if frontend + engine else ""
    axis.text(x, frontend + engine, text, ha="center", va="bottom", fontsize=7)


def _latency_bar(
    axis: Any, record: Record, metric: str, x: float, width: float, color: str
) -> None:
    middle, high = record[f"{metric}_p50_ms"], record[f"{metric}_p99_ms"]
    if middle is None:
        return
    axis.bar(x, middle, width * 0.92, color=color)
    if high is not None:
        axis.vlines(x, middle, high, color="black", linewidth=1)
        axis.plot(x, high, marker="_", color="black", markersize=6)
