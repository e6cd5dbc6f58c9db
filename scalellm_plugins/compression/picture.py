"""The report as a picture. Importing this raises ImportError where there is no matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot

if TYPE_CHECKING:
    from .report import Report

_BEFORE, _AFTER, _GONE = "#9aa5b1", "#2f855a", "#d64545"


def draw(report: Report, path: Path) -> None:
    """Draw what was dropped, and size, perplexity and speed before and after, as a PNG file."""
    pairs = [("weights, MB", [size / 1e6 for size in report.bytes])]
    if report.quality is not None:
        pairs.append(("perplexity, held-out text", list(report.quality.perplexity)))
    if report.speed is not None:
        pairs.append(("decode, tok/s (transformers)", list(report.speed.tokens_per_s)))
    extra = bool(report.influence)
    figure, axes = pyplot.subplots(
        1,
        len(pairs) + extra,
        figsize=(3.2 * (len(pairs) + 2 * extra), 3.4),
        squeeze=False,
        layout="constrained",
    )
    if extra:
        _influence(axes[0][0], report)
    for axis, (title, values) in zip(axes[0][extra:], pairs, strict=True):
        bars = axis.bar(["before", "after"], values, color=(_BEFORE, _AFTER), width=0.6)
        axis.bar_label(bars, fmt="{:,.4g}")
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _influence(axis: Any, report: Report) -> None:
    layers = range(len(report.influence))
    colors = [_GONE if layer in report.dropped_layers else _AFTER for layer in layers]
    axis.bar(layers, report.influence, color=colors)
    axis.set_title("block influence (red: dropped)", fontsize=10)
    axis.set_xlabel("layer")
    axis.spines[["top", "right"]].set_visible(False)
