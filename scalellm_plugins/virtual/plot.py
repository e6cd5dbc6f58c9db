"""The picture of a simulation: latencies, targets kept, and what happened over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scalellm_plugins.errors import ScaleLLMError

from .job import Request, Run
from .metrics import Pair, e2e, tpot, ttft
from .report import Figures

_COLORS = ("#647acb", "#e9a23b", "#2f855a", "#d64545", "#7c5295", "#3e9fbf", "#8a6d3b", "#9aa5b1")
_STYLES = ("-", "--", ":", "-.")
_MOST_GROUPS = 9


class PlotError(ScaleLLMError):
    """There is no matplotlib to draw with, or the file cannot be written."""


def need_matplotlib() -> Any:
    """Return pyplot, drawing without a screen.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise PlotError(
            "--plot: matplotlib is not installed: pip install 'scalellm-plugins[bench]', or leave "
            "--plot out (the table and --output have everything)"
        ) from None
    return pyplot


def draw(
    path: Path,
    requests: Sequence[Request],
    runs: Mapping[str, Run],
    results: Mapping[str, Figures],
) -> None:
    """Write the picture to `path` (PNG, or what its ending says).

    Raises:
        PlotError: no matplotlib, or the file cannot be written.
    """
    pyplot = need_matplotlib()
    several = any("tenants" in figures for figures in results.values())
    figure, (top, bottom) = pyplot.subplots(
        2, 5 if several else 4, figsize=(23 if several else 19, 8.5), layout="constrained"
    )
    colors = {label: _COLORS[number % len(_COLORS)] for number, label in enumerate(runs)}
    for label, run in runs.items():
        _latencies(top, list(zip(requests, run.records, strict=True)), label, colors[label])
        _over_time(bottom, run, colors[label])
    for axis, name in zip(top, ("TTFT, ms", "TPOT, ms", "E2E, ms"), strict=False):
        axis.set(xlabel=name, ylabel="share of requests", xscale="log", ylim=(0, 1))
    names = ("waiting", "running", "KV blocks in use, %", "weighted tokens per weight, by tenant")
    for axis, name in zip(bottom, names, strict=False):
        axis.set(xlabel="virtual time, s", ylabel=name, ylim=(0, None))
    _bars(top[3], results, colors, "attainment", "within targets")
    if several:
        _bars(top[4], results, colors, "ttft", "TTFT p90, ms")
        top[4].set_yscale("log")
        _gaps(bottom[4], results, colors)
    else:
        bottom[3].set_visible(False)
    for axis in (*top, *bottom):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    handles, labels = top[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    _save(figure, path)
    pyplot.close(figure)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise PlotError(f"--plot: {str(path)!r}: {error}") from None


def _latencies(axes: Sequence[Any], pairs: Sequence[Pair], label: str, color: str) -> None:
    _cumulative(axes[0], [ttft(*pair) for pair in pairs], label, color)
    _cumulative(axes[1], [tpot(record) for _, record in pairs], label, color)
    _cumulative(axes[2], [e2e(*pair) for pair in pairs], label, color)


def _cumulative(axis: Any, values: Sequence[float | None], label: str, color: str) -> None:
    known = sorted(1e3 * value for value in values if value is not None and value > 0)
    # Of all requests: a line that ends below 1 shows what never came.
    shares = [(place + 1) / len(values) for place in range(len(known))]
    axis.plot(known, shares, label=label, color=color)


def _over_time(axes: Sequence[Any], run: Run, color: str) -> None:
    times = [sample.at for sample in run.samples]
    waiting = [sample.waiting for sample in run.samples]
    running = [sample.running for sample in run.samples]
    used = [100 * sample.kv for sample in run.samples]
    for axis, values in zip(axes, (waiting, running, used), strict=False):
        axis.plot(times, values, color=color, linewidth=1)
    for place in range(min(len(run.tenants), len(_STYLES))):
        served = [sample.served[place] for sample in run.samples]
        axes[3].plot(times, served, color=color, linewidth=1, linestyle=_STYLES[place])


def _bars(
    axis: Any, results: Mapping[str, Figures], colors: Mapping[str, str], key: str, name: str
) -> None:
    """A group for all requests and one for each tenant, in it a bar for each policy."""
    first = next(iter(results.values()))
    groups = ["all", *first.get("tenants", {})][:_MOST_GROUPS]
    width = 0.8 / len(results)
    for number, (label, figures) in enumerate(results.items()):
        for place, group in enumerate(groups):
            found = (figures if group == "all" else figures["tenants"][group])[key]
            value = found["p90"] if isinstance(found, dict) else found
            x = place + (number - (len(results) - 1) / 2) * width
            axis.bar(x, value or 0.0, width * 0.92, color=colors[label])
    axis.set_xticks(range(len(groups)), groups, rotation=20)
    axis.set(ylabel=name)
    if first[key] is None:
        axis.text(0.5, 0.5, "no targets", ha="center", transform=axis.transAxes)


def _gaps(axis: Any, results: Mapping[str, Figures], colors: Mapping[str, str]) -> None:
    for label, figures in results.items():
        axis.bar(label, figures["fairness"]["gap"] or 0.0, color=colors[label])
    limit = next(iter(results.values()))["fairness"]["bound"]
    axis.axhline(limit, color="black", linestyle="--", linewidth=1)
    axis.set_yscale("symlog", linthresh=1000)
    axis.set(ylabel="largest gap in service; dashed: VTC's bound")
    axis.tick_params(axis="x", rotation=20)
