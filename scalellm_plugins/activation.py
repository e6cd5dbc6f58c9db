"""Carrying out the decision (decision.py), in the first process and in all that it starts.

The first process decides, once: from the command line (`from_command_line`) or, where there is
none (`vllm.LLM` in Python), when vLLM first loads its plugins (`from_environment`). The decision
travels in the environment; API servers, EngineCore and workers only carry it out.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import config, decision
from .decision import FeatureState
from .errors import ConfigError, ContractError
from .names import (
    ALL,
    PLATFORM,
    allowlist,
    asked_by_environment,
    check_names,
    discovered,
    environment_names,
    is_ours,
    is_vllm_command,
    load_general,
)
from .quantization import asked as quantization

if TYPE_CHECKING:
    from .patches.catalog import When

logger = logging.getLogger("vllm.scalellm")  # below "vllm": its handlers and its level


def announce(text: str) -> None:
    """Log at INFO, or write to standard error where that would not be seen.

    Since 0.32 vLLM sets up its logging from the parsed arguments, just after we decided.
    """
    if logger.hasHandlers() and logger.isEnabledFor(logging.INFO):
        logger.info("%s", text)
    else:
        print(text, file=sys.stderr, flush=True)


# What was decided


def states() -> tuple[FeatureState, ...]:
    """The decision as this process knows it; empty before it was taken."""
    rows = (config.state_from_env() or {}).get("features", [])
    return tuple(FeatureState(**row) for row in rows)


def is_on(name: str) -> bool:
    """Whether a feature is on, as far as it has been decided; False before."""
    return any(state.on for state in states() if state.name == name)


def general_only() -> list[str]:
    """General plugins that this package loads in place of vLLM; see `names.allowlist`."""
    return list((config.state_from_env() or {}).get("general_only", []))


def is_due() -> bool:
    """Whether `VLLM_PLUGINS` asks for us and nothing has been decided yet.

    vLLM parses an empty command line now and then, in every process, to learn its defaults; those
    must not decide again.
    """
    return asked_by_environment() and not states()


def is_child() -> bool:
    """Whether this process was started by vLLM, after the decision."""
    return multiprocessing.parent_process() is not None and bool(states())


def simulation_is_asked_for() -> bool:
    """Whether this process gets the simulated platform.

    vLLM asks when it first needs a platform, which may be before its command line is parsed: then
    the environment alone answers, and `_platform_is_stale` finds out later if that was wrong.

    Raises:
        ScaleLLMError: the environment asks for what cannot be (vLLM goes on to look for another
            platform, and the same error comes again where it is shown).
    """
    if states():
        return is_on("sim")
    if not asked_by_environment():
        return False
    (sim,) = decision.decide(environment_names() or [], config.current(), only=["sim"])
    return sim.on


# The command line


def from_command_line(
    names: Sequence[str],
    options: Mapping[str, Any],
    arguments: argparse.Namespace,
    command: str = "serve",
) -> None:
    """Act on `--plugins` and `--scalellm`, before vLLM starts anything.

    Checks, decides, prints the table, exports everything for the processes to come and applies
    this process's patches. May restart the process (`_restart`) and then does not return.
    `command` is vLLM's, such as "serve" or "bench throughput"; "" for its API server's module.

    Raises:
        ScaleLLMError: what the user asked for cannot be; the text says what would.
    """
    check_names(names, "--plugins")
    before = environment_names()
    check_names(filter(is_ours, before or []), "VLLM_PLUGINS")
    every = [*(before or []), *names]
    raw = config.merge(config.raw_from_env(), options)
    parsed = config.parse(raw)
    asked = any(map(is_ours, every))
    if options and not asked and parsed.enabled:
        raise ConfigError(
            f"argument --scalellm: {dict(options)!r} has no effect, since no plugin of ScaleLLM "
            "was asked for. Add --plugins scalellm (or VLLM_PLUGINS=scalellm)."
        )
    if not asked:
        quantization.refuse_off(quantization.methods(arguments), None, by_choice=True)
    if not asked and not names:
        return
    decided: tuple[FeatureState, ...] = ()
    if asked:
        decided = decision.decide(every, parsed, _unfit(command, arguments))
        raw = _with_worker_bounds(raw, decided, parsed, arguments)
        _check_tenants(decided, parsed)
        _check_quantization(every, decided, parsed, raw, arguments)
    _export(names, raw if asked else None, decided)
    if _platform_is_stale(before, names):
        _restart()
    config.clear_restarted()
    if before is not None:
        # What was named only now, and what a restart found no longer allowed.
        load_general({*names, *general_only()} - set(before))
    if asked:
        announce(decision.table(decided))
        carry_out()
        if is_on("frontend"):
            _apply_on("frontend", when="serve")


def _unfit(command: str, arguments: argparse.Namespace) -> dict[str, str]:
    """Features that make no sense in this command of vLLM → why."""
    if command.partition(" ")[0] not in ("", "serve", "launch"):
        reason = f"`vllm {command}` has no HTTP server"
    elif getattr(arguments, "headless", False):
        reason = "--headless: no API server on this node"
    else:
        unfit = {}
        if command != "serve":
            unfit["frontend"] = "only `vllm serve` starts several API servers"
        elif getattr(arguments, "data_parallel_multi_port_external_lb", False):
            unfit["frontend"] = "--data-parallel-multi-port-external-lb: one API server per rank"
        elif getattr(arguments, "grpc", False):
            unfit["frontend"] = "--grpc: no HTTP server"
        elif _has_rust_frontend():
            reason = "VLLM_USE_RUST_FRONTEND: the HTTP server is not Python"
            unfit |= {"frontend": reason, "ipc": reason}
        return unfit
    return {"frontend": reason, "status": reason, "ipc": reason}


def _has_rust_frontend() -> bool:
    envs = sys.modules.get("vllm.envs")
    return bool(getattr(envs, "VLLM_USE_RUST_FRONTEND", False))


def _with_worker_bounds(
    raw: Mapping[str, Any],
    decided: Iterable[FeatureState],
    options: config.Config,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Return the options with the frontend's bounds spelt out, for every process of the server.

    Raises:
        ConfigError: options of ours or of vLLM's contradict each other.
    """
    if "frontend" not in {state.name for state in decided if state.on}:
        return dict(raw)
    own = _own_default(arguments)
    low, high = config.worker_bounds(
        options.frontend,
        getattr(arguments, "api_server_count", None),
        cores=1 if _is_balanced_elsewhere(arguments) else len(os.sched_getaffinity(0)),
        at_least=own,
    )
    if max(high, own) > 1:  # one, where vLLM would start several, must be said, too
        arguments.api_server_count = high
    return config.merge(raw, {"frontend": {"min_workers": low, "max_workers": high}})


def _check_tenants(decided: Iterable[FeatureState], options: config.Config) -> None:
    """Read the tenants file: what is wrong with it is better said before the model is loaded.

    Raises:
        ConfigError: it cannot be used.
    """
    path = options.frontend.tenants
    if path is not None and "frontend" in {state.name for state in decided if state.on}:
        from .frontends import tenants

        tenants.load(path)


def _check_quantization(
    names: Sequence[str],
    decided: Iterable[FeatureState],
    options: config.Config,
    raw: Mapping[str, Any],
    arguments: argparse.Namespace,
) -> None:
    """Hold vLLM's --quantization against the feature and its options.

    Raises:
        ConfigError: a method of a feature that is off, or an option that does nothing.
    """
    methods = quantization.methods(arguments)
    state = next(state for state in decided if state.name == "quantization")
    if not state.on:
        chosen = "quantization" not in decision.requested(names, options)
        quantization.refuse_off(methods, state.why, by_choice=chosen)
    elif hasattr(arguments, "quantization") and (why := quantization.without_effect(methods, raw)):
        raise ConfigError(why)


def _is_balanced_elsewhere(arguments: argparse.Namespace) -> bool:
    """Whether each data-parallel rank has its own server, behind somebody else's load balancer."""
    rank = getattr(arguments, "data_parallel_rank", None)
    return rank is not None or bool(getattr(arguments, "data_parallel_external_lb", False))


def _own_default(arguments: argparse.Namespace) -> int:
    """How many API servers vLLM would start by itself."""
    if _is_balanced_elsewhere(arguments):
        return 1
    local = getattr(arguments, "data_parallel_start_rank", None) is not None
    if local or getattr(arguments, "data_parallel_hybrid_lb", False):
        return getattr(arguments, "data_parallel_size_local", None) or 1
    return getattr(arguments, "data_parallel_size", None) or 1


def _export(
    names: Sequence[str], raw: Mapping[str, Any] | None, decided: Sequence[FeatureState]
) -> None:
    """Put names, options and decision into the environment of this process and its children."""
    kept = general_only()  # from before a restart
    allowed, fresh = allowlist([*names, *(f"{ALL}.{state.name}" for state in decided if state.on)])
    os.environ["VLLM_PLUGINS"] = ",".join(allowed)
    if raw is not None:
        config.raw_to_env(raw)
    config.state_to_env(
        {
            "features": [asdict(state) for state in decided],
            "general_only": sorted({*kept, *fresh}),
        }
    )


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

    Raises:
        ConfigError: it would not help, or would restart something that is not ours to restart.
    """
    value = os.environ["VLLM_PLUGINS"]
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        raise ConfigError(
            "argument --plugins: VLLM_TARGET_DEVICE='cpu' keeps vLLM from asking platform plugins. "
            "Unset it, or drop the platform plugin."
        )
    if not is_vllm_command():
        raise ConfigError(
            "argument --plugins: a platform plugin must be known before vLLM is imported. "
            f"Set VLLM_PLUGINS={value} before."
        )
    if not config.mark_restarted():
        raise ConfigError(
            "argument --plugins: vLLM did not take the platform of the plugin that was named. "
            f"VLLM_PLUGINS={value!r}; see vLLM's log with VLLM_LOGGING_LEVEL=DEBUG."
        )
    announce("Restarting this process: a platform plugin must be known from the first import.")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# Everywhere else


def from_environment() -> None:
    """Carry out the decision, or take it where no command line did (`vllm.LLM` in Python).

    Raises:
        ScaleLLMError: `VLLM_PLUGINS` or `SCALELLM_CONFIG` asks for what cannot be.
    """
    if not states():
        names = environment_names() or []
        check_names(filter(is_ours, names), "VLLM_PLUGINS")
        options = config.current()
        no_server = "no HTTP server: vLLM runs as a library here"
        decided = decision.decide(names, options, {"frontend": no_server, "status": no_server})
        decided = tuple(_without_late_platform(state, options) for state in decided)
        config.state_to_env({"features": [asdict(state) for state in decided]})
        announce(decision.table(decided))
    carry_out()


def _without_late_platform(state: FeatureState, options: config.Config) -> FeatureState:
    """Turn the simulated GPU off where vLLM already chose another platform: as in a notebook."""
    resolved = getattr(sys.modules.get("vllm.platforms"), "_current_platform", None)
    if (
        state.name != "sim"
        or not state.on
        or resolved is None
        or type(resolved).__module__.startswith(f"{__package__}.simulator.")
    ):
        return state
    why = "vLLM chose its platform before VLLM_PLUGINS named it; set that before importing vllm"
    if options.strict:
        raise ContractError(f"scalellm.strict: sim: {why}")
    return FeatureState(state.name, False, why)


def carry_out() -> None:
    """Apply the patches of the features that are on. Idempotent.

    Raises:
        ContractError: `scalellm.strict`, and a patch no longer fits.
    """
    for state in states():
        if state.on:
            _apply_on(state.name, when="process")
            # Without vLLM, as in `scalellm doctor`, nobody could look the names up.
            if state.name == "quantization" and "vllm" in sys.modules:
                from .quantization import configs

                configs.register()
            # Elsewhere the import alone would cost seconds.
            if "vllm.v1.engine.core" in sys.modules:
                _apply_on(state.name, when="engine")


def _apply_on(feature: str, *, when: When) -> None:
    """Apply a feature's patches of one moment; warn of those that no longer fit, or refuse."""
    for reason in apply_patches(feature, when=when, strict=config.current().strict):
        logger.warning("scalellm.%s is off in this process: %s", feature, reason)


def apply_patches(feature: str, *, when: When, strict: bool = False) -> list[str]:
    """Apply a feature's patches that belong to this moment; return why some could not be.

    Raises:
        ContractError: with `strict`, a patch cannot be applied.
    """
    from .patches import registry

    outcomes = [
        registry.apply(patch, strict=strict)
        for patch in registry.patches_for(when)
        if patch.feature == feature
    ]
    return [outcome.reason for outcome in outcomes if not outcome.on]
