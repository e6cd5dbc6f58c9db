"""What was done and what it cost: compression.json, a table, a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from .checkpoint import Checkpoint
from .container import writing
from .journal import write_whole
from .measure import Quality, Speed
from .plan import Selection, Step, ignored_modules, kept_channels
from .recipe import Recipe

NAME, PICTURE = "compression.json", "compression.png"


class Report(msgspec.Struct, frozen=True):
    """compression.json. Sizes in bytes of weights; `…_skipped` says why something is missing."""

    source: str
    recipe: Recipe
    layers: tuple[int, int]
    dropped_layers: tuple[int, ...]
    influence: tuple[float, ...]
    channels: tuple[int, int]
    kept_importance: dict[int, float]
    quantized_matrices: int
    ignored: list[str]
    bytes: tuple[int, int]
    quality: Quality | None = None
    quality_skipped: str = ""
    speed: Speed | None = None
    speed_skipped: str = ""
    versions: dict[str, str] = {}


def make(
    checkpoint: Checkpoint,
    recipe: Recipe,
    selection: Selection,
    plan: Mapping[str, tuple[Step, ...]],
    **measured: Any,
) -> Report:
    """Put together what is known; `measured`: the fields from `quality` on."""
    steps = [step for chosen in plan.values() for step in chosen]
    kept = selection.layers
    return Report(
        source=checkpoint.folder.name,
        recipe=recipe,
        layers=(checkpoint.layers, len(kept)),
        dropped_layers=tuple(i for i in range(checkpoint.layers) if i not in kept),
        influence=selection.influence,
        channels=(checkpoint.channels, kept_channels(recipe, checkpoint.channels)),
        kept_importance=selection.kept_importance,
        quantized_matrices=sum(step.quantized for step in steps),
        ignored=ignored_modules(checkpoint, recipe),
        bytes=(checkpoint.nbytes, sum(spec.nbytes for step in steps for spec in step.outputs)),
        **measured,
    )


def save(report: Report, folder: Path) -> None:
    """Write compression.json, and compression.png where matplotlib is installed."""
    write_whole(folder / NAME, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    try:
        from .picture import draw
    except ImportError:
        return
    with writing(folder / PICTURE):
        draw(report, folder / PICTURE)


def table(report: Report) -> str:
    """The report for people."""
    rows = [("", "before", "after", "")]
    before, after = (size / 1e6 for size in report.bytes)
    rows.append(_row("weights, MB", before, after, "{:,.2f}"))
    if report.layers[0] != report.layers[1]:
        note = "without " + ", ".join(map(str, report.dropped_layers))
        rows.append((*_row("layers", *report.layers, "{:d}")[:3], note))
    if report.channels[0] != report.channels[1]:
        share = min(report.kept_importance.values())
        note = f"at least {share:.0%} of importance"
        rows.append((*_row("MLP channels", *report.channels, "{:d}")[:3], note))
    if report.recipe.scheme:
        note = f"{report.quantized_matrices} matrices"
        rows.append(("weights of matrices", "", report.recipe.scheme, note))
    rows += _measured(report)
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
        for row in rows
    )


def _measured(report: Report) -> list[tuple[str, str, str, str]]:
    rows = []
    if (found := report.quality) is not None:
        rows.append(_row("perplexity, held-out text", *found.perplexity, "{:.3f}"))
        rows.append(("logit KL, nats per token", "", f"{found.kl:.4f}", ""))
        rows.append(("same best token", "", f"{found.agreement:.1%}", ""))
    else:
        rows.append(("quality", "", "-", report.quality_skipped))
    if (timed := report.speed) is not None:
        rows.append(_row("decode, tok/s (transformers)", *timed.tokens_per_s, "{:,.1f}"))
    else:
        rows.append(("speed", "", "-", report.speed_skipped))
    return rows


def _row(name: str, before: float, after: float, form: str) -> tuple[str, str, str, str]:
    ratio = f"× {after / before:.2f}" if before else ""
    return name, form.format(before), form.format(after), ratio
