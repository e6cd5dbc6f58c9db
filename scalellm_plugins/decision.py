"""Which features are on: from names, options and contracts to one row per feature, with its reason.

Nothing here changes anything; `activation.py` carries the decision out and hands it on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from . import __version__, config
from .errors import ContractError, UnsupportedVLLMError
from .features import FEATURES, Feature
from .names import ALL


@dataclass(frozen=True)
class FeatureState:
    """One row of the start-up table: is the feature on in this server, and why."""

    name: str
    on: bool
    why: str


def requested(names: Iterable[str], options: config.Config) -> dict[str, str]:
    """Map each feature that is asked for to the reason; those that are switched off are absent.

    A switch (`--scalellm.ipc off`) beats a name, whichever side it takes.
    """
    named = set(names)
    wanted: dict[str, str] = {}
    if not options.enabled:
        return wanted
    for feature in FEATURES.values():
        switch = getattr(options, feature.name).enabled
        if switch is not None:
            if switch:
                wanted[feature.name] = f"--scalellm.{feature.name} on"
        elif ALL in named and feature.default:
            wanted[feature.name] = f"--plugins {ALL}"
        elif f"{ALL}.{feature.name}" in named:
            wanted[feature.name] = f"--plugins {ALL}.{feature.name}"
    return wanted


def decide(
    names: Sequence[str],
    options: config.Config,
    unfit: Mapping[str, str] | None = None,
    only: Iterable[str] | None = None,
) -> tuple[FeatureState, ...]:
    """Decide every feature, or those in `only`, checking the contracts of what is asked for.

    `unfit` maps features that make no sense in this process (HTTP routes where there is no server)
    to the reason.

    Raises:
        ContractError: `scalellm.strict`, and a feature that was asked for cannot be on. Features
            that are planned or unfit count only if they were asked for by their own name or
            switch: `--plugins scalellm` promises what is safe here, and strict that nothing of
            that is missing.
    """
    unfit = unfit or {}
    wanted = requested(names, options)
    features = [FEATURES[name] for name in (FEATURES if only is None else only)]
    states = tuple(_decide_one(feature, wanted, options, unfit) for feature in features)
    if options.strict:
        _refuse_missing(states, wanted, names, unfit)
    return states


def _refuse_missing(
    states: Iterable[FeatureState],
    wanted: Mapping[str, str],
    names: Sequence[str],
    unfit: Mapping[str, str],
) -> None:
    missing = []
    for state in states:
        named = f"{ALL}.{state.name}" in names or wanted.get(state.name) != f"--plugins {ALL}"
        excused = FEATURES[state.name].status == "planned" or state.name in unfit
        if state.name in wanted and not state.on and (named or not excused):
            missing.append(f"{state.name}: {state.why}")
    if missing:
        raise ContractError(
            "scalellm.strict: not every feature that was asked for can be on. "
            f"{'; '.join(missing)}. Drop --scalellm.strict to serve without, or see "
            "`scalellm doctor`."
        )


def _decide_one(
    feature: Feature,
    wanted: Mapping[str, str],
    options: config.Config,
    unfit: Mapping[str, str],
) -> FeatureState:
    name = feature.name
    if name not in wanted:
        return FeatureState(name, False, _why_not_wanted(name, options))
    if feature.status == "planned":
        return FeatureState(name, False, f"planned: not in version {__version__}")
    if name in unfit:
        return FeatureState(name, False, unfit[name])
    broken = contract_reasons(name)
    if broken:
        more = f" (and {len(broken) - 1} more: see `scalellm doctor`)" if broken[1:] else ""
        return FeatureState(name, False, broken[0] + more)
    return FeatureState(name, True, wanted[name])


def _why_not_wanted(name: str, options: config.Config) -> str:
    if not options.enabled:
        return "--scalellm off"
    section = getattr(options, name)
    why = f"--scalellm.{name} off" if section.enabled is False else "not asked for"
    if section != type(section)(enabled=section.enabled):
        why += "; its options have no effect"
    return why


def contract_reasons(feature: str) -> list[str]:
    """One line for each way in which this vLLM is not what the feature needs; empty: it is.

    What the plugin as a whole needs ("core") counts for every feature, as in `scalellm doctor`.
    """
    from . import compat

    try:
        source = compat.installed_source()
    except UnsupportedVLLMError as error:
        return [str(error)]
    reports = compat.feature_states(source, ["core", feature])
    return [reason for report in reports for reason in report.reasons]


def table(states: Iterable[FeatureState]) -> str:
    """The start-up table, without a trailing newline."""
    rows = [("feature", "on", "why")]
    rows += [(state.name, "on" if state.on else "off", state.why) for state in states]
    width = max(len(row[0]) for row in rows)
    lines = [f"  {name:<{width}}  {on:<3}  {why}" for name, on, why in rows]
    return "\n".join([f"ScaleLLM plugins {__version__}", *lines])
