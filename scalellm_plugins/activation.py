"""Which features are on: from names and options to one decision that all processes share.

The first process decides, once: from the command line (`from_command_line`) or, where there is
none (`vllm.LLM` in Python), when vLLM first loads its plugins (`from_environment`). The decision
travels in the environment; API servers, EngineCore and workers only carry it out.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from . import __version__, config
from .errors import ConfigError, ContractError, UnsupportedVLLMError
from .features import FEATURES, Feature
from .names import (
    ALL,
    PLATFORM,
    allowlist,
    asked_by_environment,
    check_names,
    discovered,
    environment_names,
    is_ours,
    load_general,
)

if TYPE_CHECKING:
    from .patches.registry import When

logger = logging.getLogger("vllm.scalellm")  # below "vllm": its handlers and its level


@dataclass(frozen=True)
class FeatureState:
    """One row of the start-up table: is the feature on in this server, and why."""

    name: str
    on: bool
    why: str


# Decisions


def is_due() -> bool:
    """Whether `VLLM_PLUGINS` asks for us and nothing has been decided yet.

    vLLM parses an empty command line now and then, in every process, to learn its defaults; those
    must not decide again.
    """
    return asked_by_environment() and "features" not in (config.state_from_env() or {})


def requested(names: Iterable[str], options: config.Config) -> dict[str, str]:
    """Map each feature that is asked for to the reason; those that are switched off are absent.

    A switch (`--scalellm.ipc off`) beats a name, whichever side it takes.
    """
    named = set(names)
    wanted: dict[str, str] = {}
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


def decide(names: Sequence[str], options: config.Config) -> tuple[FeatureState, ...]:
    """Decide every feature, checking the contracts of those that are asked for.

    Raises:
        ContractError: `scalellm.strict`, and a feature that was asked for by its own name or
            switch, or one that is ready, cannot be on.
    """
    if not options.enabled:
        return tuple(FeatureState(name, False, "--scalellm off") for name in FEATURES)
    wanted = requested(names, options)
    states = tuple(_decide_one(feature, wanted, options) for feature in FEATURES.values())
    if options.strict:
        _refuse_missing(states, wanted, names)
    return states


def _refuse_missing(
    states: Iterable[FeatureState], wanted: Mapping[str, str], names: Sequence[str]
) -> None:
    """Raise ContractError if a feature that was asked for is off.

    A planned feature counts only if it was named: `--plugins scalellm` promises what is safe here,
    and `--scalellm.strict` that nothing of that is missing.
    """
    missing = [
        f"{state.name}: {state.why}"
        for state in states
        if state.name in wanted
        and not state.on
        and (
            FEATURES[state.name].status != "planned"
            or f"{ALL}.{state.name}" in names
            or wanted[state.name] != f"--plugins {ALL}"
        )
    ]
    if missing:
        raise ContractError(
            f"scalellm.strict: not every feature that was asked for can be on. "
            f"{'; '.join(missing)}. Drop --scalellm.strict to serve without, or see "
            "`scalellm doctor`."
        )


def _decide_one(
    feature: Feature, wanted: Mapping[str, str], options: config.Config
) -> FeatureState:
    name = feature.name
    if name not in wanted:
        section = getattr(options, name)
        why = f"--scalellm.{name} off" if section.enabled is False else "not asked for"
        if section != type(section)(enabled=section.enabled):
            why += "; its options have no effect"
        return FeatureState(name, False, why)
    if feature.status == "planned":
        return FeatureState(name, False, f"planned: not in version {__version__}")
    broken = contract_reasons(name)
    if broken:
        more = f" (and {len(broken) - 1} more: see `scalellm doctor`)" if broken[1:] else ""
        return FeatureState(name, False, broken[0] + more)
    return FeatureState(name, True, wanted[name])


def contract_reasons(feature: str) -> list[str]:
    """One line for each way in which this vLLM is not what the feature needs; empty: it is."""
    from . import compat
    from .patches import registry

    try:
        source = compat.installed_source()
    except UnsupportedVLLMError as error:
        return [str(error)]
    entries = [entry for entry in (*registry.PATCHES, *registry.SEAMS) if entry.feature == feature]
    return [reason for entry in entries for reason in registry.check(entry, source)]


def table(states: Iterable[FeatureState]) -> str:
    """The start-up table, without a trailing newline."""
    rows = [("feature", "on", "why")]
    rows += [(state.name, "on" if state.on else "off", state.why) for state in states]
    width = max(len(row[0]) for row in rows)
    lines = [f"  {name:<{width}}  {on:<3}  {why}" for name, on, why in rows]
    return "\n".join([f"ScaleLLM plugins {__version__}", *lines])


def announce(text: str) -> None:
    """Log at INFO, or write to standard error while vLLM has not set up its logging yet.

    Since 0.32 it does so from the parsed arguments, just after the command line decided.
    """
    if logger.hasHandlers():
        logger.info("%s", text)
    else:
        print(text, file=sys.stderr, flush=True)


# Entry: the command line


def from_command_line(
    names: Sequence[str], options: Mapping[str, Any], arguments: argparse.Namespace
) -> None:
    """Act on `--plugins` and `--scalellm`, before vLLM starts anything.

    Checks, decides, prints the table, exports everything for the processes to come and applies
    this process's patches. May restart the process (`_restart`) and then does not return.

    Raises:
        ScaleLLMError: what the user asked for cannot be; the text says what would.
    """
    check_names(names, "--plugins")
    before = environment_names() or []
    check_names(filter(is_ours, before), "VLLM_PLUGINS")
    every = [*before, *names]
    raw = config.merge(config.raw_from_env(), options)
    parsed = config.parse(raw)
    if options and not any(map(is_ours, every)) and parsed.enabled:
        raise ConfigError(
            f"argument --scalellm: {dict(options)!r} has no effect, since no plugin of ScaleLLM "
            "was asked for. Add --plugins scalellm (or VLLM_PLUGINS=scalellm)."
        )
    if not any(map(is_ours, every)):
        _export_names(names)
        return
    states = decide(every, parsed)
    _check_arguments(states, parsed, arguments)
    config.raw_to_env(raw)
    _export_states(states)
    _export_names([*names, *(f"{ALL}.{state.name}" for state in states if state.on)])
    announce(table(states))
    carry_out()
    _set_arguments(states, parsed, arguments)


def _check_arguments(
    states: Iterable[FeatureState], options: config.Config, arguments: argparse.Namespace
) -> None:
    """Refuse combinations of our options and vLLM's."""
    on = {state.name for state in states if state.on}
    count = getattr(arguments, "api_server_count", None)
    workers = options.frontend.workers
    if "frontend" in on and workers is not None and count not in (None, workers):
        raise ConfigError(
            f"scalellm.frontend.workers: {workers} contradicts --api-server-count {count}. "
            "Give one of the two."
        )


def _set_arguments(
    states: Iterable[FeatureState], options: config.Config, arguments: argparse.Namespace
) -> None:
    on = {state.name for state in states if state.on}
    if "frontend" in on and options.frontend.workers is not None:
        arguments.api_server_count = options.frontend.workers


def _export_names(names: Sequence[str]) -> None:
    """Extend `VLLM_PLUGINS`, and load in this process what it did not load before."""
    before = environment_names()
    allowed, general_only = allowlist(names)
    os.environ["VLLM_PLUGINS"] = ",".join(allowed)
    state = config.state_from_env() or {}
    config.state_to_env({"general_only": general_only, **state})
    if _platform_is_stale(before, names):
        _restart()
    if before is not None:
        load_general(set(names) - set(before))


def _export_states(states: Iterable[FeatureState]) -> None:
    state = config.state_from_env() or {}
    config.state_to_env({**state, "features": [asdict(row) for row in states]})


def _platform_is_stale(before: Sequence[str] | None, names: Sequence[str]) -> bool:
    """Whether vLLM resolved its platform before it could know about `names` and the decision.

    It does so while it builds its command line, and dozens of its modules keep the object; there
    is no way to change it afterwards.
    """
    platforms = sys.modules.get("vllm.platforms")
    resolved = getattr(platforms, "_current_platform", None)
    if resolved is None:
        return False
    simulated = type(resolved).__module__.startswith(f"{__package__}.simulator.")
    if simulated != is_on("sim"):
        return True
    foreign = {name for name in names if not is_ours(name)} & discovered(PLATFORM)
    return before is not None and not foreign <= set(before)


def _restart() -> None:
    """Run the same command line again in this process, with the environment as it now is.

    Costs the imports (seconds), but leaves no half-changed vLLM behind: same process id, same
    descriptors, and the platform is right from the first import on.
    """
    if not config.mark_restarted():
        raise ConfigError(
            "the platform plugin named in --plugins was not activated by vLLM after a restart. "
            f"VLLM_PLUGINS={os.environ.get('VLLM_PLUGINS')!r}: start with it set from the outside."
        )
    announce("Restarting this process: a platform plugin must be known from the first import.")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# Entry: everywhere else


def from_environment() -> None:
    """Carry out the decision, or take it where no command line did (`vllm.LLM` in Python).

    Raises:
        ScaleLLMError: `VLLM_PLUGINS` or `SCALELLM_CONFIG` asks for what cannot be.
    """
    if "features" not in (config.state_from_env() or {}):
        names = environment_names() or []
        check_names(filter(is_ours, names), "VLLM_PLUGINS")
        states = decide(names, config.current())
        _export_states(states)
        announce(table(states))
    carry_out()


def states() -> tuple[FeatureState, ...]:
    """The decision as this process knows it; empty before it was taken."""
    rows = (config.state_from_env() or {}).get("features", [])
    return tuple(FeatureState(**row) for row in rows)


def is_on(name: str) -> bool:
    """Whether a feature is on, as far as it has been decided; False before."""
    return any(state.on for state in states() if state.name == name)


def simulation_is_asked_for() -> bool:
    """Whether this process gets the simulated platform.

    vLLM asks when it first needs a platform, which may be before its command line is parsed: then
    the environment alone answers, and `_platform_is_stale` finds out later if that was wrong.
    """
    if "features" in (config.state_from_env() or {}):
        return is_on("sim")
    return "sim" in requested(environment_names() or [], config.current())


def general_only() -> list[str]:
    """General plugins that this package loads in place of vLLM; see `allowlist`."""
    return list((config.state_from_env() or {}).get("general_only", []))


def carry_out() -> None:
    """Apply the patches of the features that are on. Idempotent.

    Raises:
        ContractError: `scalellm.strict`, and a patch no longer fits.
    """
    on = [state.name for state in states() if state.on]
    if on:
        strict = config.current().strict
        for name in on:
            apply_patches(name, when="process", strict=strict)


def apply_patches(feature: str, *, when: When, strict: bool = False) -> None:
    """Apply a feature's patches that belong to this moment; one that cannot be says so.

    Raises:
        ContractError: with `strict`, a patch cannot be applied.
    """
    from .patches import registry

    for patch in registry.patches_for(when):
        if patch.feature == feature:
            outcome = registry.apply(patch, strict=strict)
            if not outcome.on:
                logger.warning("scalellm.%s is off in this process: %s", feature, outcome.reason)
