"""`scalellm doctor`: which features the installed vLLM, or the one in a wheel, can carry.

Reads source and metadata only; neither vLLM nor torch is imported, so it takes about a second and
works on a machine that could not run vLLM at all.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalellm_plugins import __version__, compat
from scalellm_plugins.errors import ConfigError, closest_first
from scalellm_plugins.features import FEATURES, SUPPORTED_VLLM

if TYPE_CHECKING:
    from scalellm_plugins.patches.sources import Source

CORE = "core"
"""The row for what every feature needs."""


@dataclass(frozen=True)
class Report:
    """Everything that doctor has to say; the table and the JSON are two views of it."""

    distribution: str
    version: str
    location: str
    wheel: bool
    features: tuple[compat.FeatureReport, ...]
    shown: frozenset[str]
    strict: bool

    @property
    def supported(self) -> bool:
        """Whether the contracts were written for this release."""
        return compat.supported(self.version)

    @property
    def core_holds(self) -> bool:
        """Whether the plugin can do anything at all here."""
        return not any(one.broken for one in self.features if one.name == CORE)

    def can_be_on(self, feature: compat.FeatureReport) -> bool:
        """Whether a feature's own contracts hold, and core's."""
        return not feature.broken and self.core_holds

    @property
    def failed(self) -> list[str]:
        """Features that fail the command: built ones that cannot be on; all such under strict."""
        return [
            one.name
            for one in self.features
            if one.name in self.shown | {CORE}
            and not self.can_be_on(one)
            and (self.strict or one.status != "planned")
        ]


def run(arguments: argparse.Namespace) -> int:
    """Print the report. Returns 0 when every built feature can be on, else 1.

    Raises:
        ScaleLLMError: there is no vLLM to look at, or no feature of that name (exit code 2).
    """
    shown = _names(arguments.feature)
    if arguments.wheel is not None:
        wheel = compat.wheel_source(Path(arguments.wheel))
        source: Source = wheel
        distribution, location = wheel.distribution, str(arguments.wheel)
    else:
        found = compat.require()
        source = compat.installed_source()
        distribution, location = found.distribution, str(found.root / "vllm")
    features = tuple(compat.feature_states(source, [CORE, *(n for n in FEATURES if n in shown)]))
    report = Report(
        distribution,
        source.version,
        location,
        arguments.wheel is not None,
        features,
        shown,
        arguments.strict,
    )
    text = json.dumps(as_json(report), indent=2) if arguments.json else "\n".join(lines(report))
    print(text, flush=True)
    return 1 if report.failed else 0


def _names(given: list[str] | None) -> frozenset[str]:
    """Return the features to show; refuse names that there are not."""
    valid = [CORE, *FEATURES]
    for name in given or []:
        if name not in valid:
            raise ConfigError(
                f"--feature {name}: no such feature. Valid: {', '.join(closest_first(name, valid))}"
            )
    return frozenset(given or valid)


# ---- The table --------------------------------------------------------------------------------


def lines(report: Report) -> Iterator[str]:
    """Yield the report for people, line by line."""
    yield from _environment(report)
    yield ""
    rows: list[tuple[str, ...]] = [("feature", "status", "patches", "seams", "contract", "verdict")]
    reasons: dict[int, list[str]] = {}
    for feature in report.features:
        if feature.name in report.shown:
            reasons[len(rows)] = list(_reasons(feature))
            rows.append(_row(report, feature))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()
        yield from (f"    {reason}" for reason in reasons.get(number, []))
    yield ""
    yield summary(report)


def _environment(report: Report) -> Iterator[str]:
    yield f"scalellm-plugins {__version__}, for vLLM {SUPPORTED_VLLM}"
    outside = "" if report.supported else " (outside the supported range)"
    yield f"vLLM {report.version}{outside}, distribution {report.distribution}: {report.location}"
    if report.wheel:
        yield "checked from the wheel's source; nothing was installed or imported"
        return
    yield f"Python {platform.python_version()}, torch {_torch()}"
    loads, verdict = compat.vllm_plugins_verdict(os.environ.get("VLLM_PLUGINS"))
    yield f"VLLM_PLUGINS {'' if loads else 'WARNING '}{verdict}"


def _torch() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _row(report: Report, feature: compat.FeatureReport) -> tuple[str, ...]:
    kinds = [contract.kind for contract in feature.contracts]
    contract = f"{feature.broken} broken" if feature.broken else "ok"
    return (
        feature.name,
        feature.status,
        str(kinds.count("patch")),
        str(kinds.count("seam")),
        contract,
        _verdict(report, feature),
    )


def _verdict(report: Report, feature: compat.FeatureReport) -> str:
    if feature.status == "planned":
        return "not built yet" + (", and could not be on" if feature.broken else "")
    if report.can_be_on(feature):
        declared = FEATURES.get(feature.name)
        asked = declared is not None and not declared.default
        return f"can be on (--plugins scalellm.{feature.name})" if asked else "can be on"
    return "cannot be on" + ("" if feature.broken else ": core is broken")


def _reasons(feature: compat.FeatureReport) -> Iterator[str]:
    for contract in feature.contracts:
        for reason in contract.reasons:
            yield f"{contract.kind} {contract.name}: {reason}"


def summary(report: Report) -> str:
    """Return the last line: the verdict that the exit code stands for."""
    if report.failed:
        return f"vLLM {report.version}: cannot be on: {', '.join(report.failed)}"
    broken = [one.name for one in report.features if one.broken]
    note = f"; seams of planned features are broken: {', '.join(broken)}" if broken else ""
    return f"vLLM {report.version}: every feature that is built can be on{note}"


# ---- JSON -------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """Return the report for programs; `ok` is what the exit code says."""
    loads, verdict = compat.vllm_plugins_verdict(os.environ.get("VLLM_PLUGINS"))
    return {
        "ok": not report.failed,
        "failed": report.failed,
        "scalellm_plugins": __version__,
        "vllm": {
            "distribution": report.distribution,
            "version": report.version,
            "location": report.location,
            "wheel": report.wheel,
            "supported": report.supported,
            "supported_range": SUPPORTED_VLLM,
        },
        # What runs here says nothing about what a wheel will run on.
        "environment": None
        if report.wheel
        else {
            "python": platform.python_version(),
            "executable": sys.executable,
            "torch": _torch(),
            "vllm_plugins": os.environ.get("VLLM_PLUGINS"),
            "loads_us": loads,
            "verdict": verdict,
        },
        "features": [
            {
                "name": one.name,
                "status": one.status,
                "summary": one.summary,
                "can_be_on": report.can_be_on(one) and one.status != "planned",
                "contracts": [
                    {"name": c.name, "kind": c.kind, "ok": not c.reasons, "reasons": [*c.reasons]}
                    for c in one.contracts
                ],
            }
            for one in report.features
            if one.name in report.shown
        ],
    }
