"""The systems that are compared: names for ways to start `vllm serve`.

A system is data: which plugins, which extra options, which environment. New ones need no code:

    --system 'noipc=scalellm --scalellm.ipc off'
    --system 'lane=vllm --plugins scalellm.frontend'
    --system 'x4=vllm --api-server-count 4'
    --system 'debug=VLLM_LOGGING_LEVEL=DEBUG vllm-x2'

Each is NAME=[VARIABLE=VALUE …] BASE [OPTION …]: what BASE is, plus the variables and the options;
`--plugins` replaces BASE's plugins (the simulated GPU's is added to every system by itself).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scalellm_plugins.errors import ConfigError, closest_first

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*=.*", re.DOTALL)
_SIM = "scalellm.sim"
SERVED_NAME = "bench"


@dataclass(frozen=True)
class System:
    """One way to serve. `needs` names the option without which it cannot be started."""

    name: str
    summary: str
    plugins: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""


BUILT_IN: dict[str, System] = {
    system.name: system
    for system in (
        System("vllm", "vLLM as it comes: one Python API server"),
        System("vllm-x2", "vLLM with two API servers", args=("--api-server-count", "2")),
        System(
            "vllm-rs",
            "vLLM's Rust frontend, of which --vllm-rs gives the binary",
            env={"VLLM_USE_RUST_FRONTEND": "1"},
            needs="--vllm-rs",
        ),
        System("scalellm", "every feature of this package", plugins=("scalellm",)),
    )
}


@dataclass(frozen=True)
class Target:
    """What all systems serve: the model and the simulated GPU (`gpu` None: the real device)."""

    model_dir: Path
    gpu: str | None
    preset: str | None
    vllm_rs: Path | None = None
    server_args: tuple[str, ...] = ()


def define(text: str, known: Mapping[str, System]) -> System:
    """Make a system from NAME=[VARIABLE=VALUE …] BASE [OPTION …].

    Raises:
        ConfigError: not of that form, or BASE is not in `known`.
    """
    name, equals, rest = text.partition("=")
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise ConfigError(f"--system: {text!r}: {error}. Check the quotes.") from None
    env: dict[str, str] = {}
    while words and _VARIABLE.fullmatch(words[0]):
        variable, _, value = words.pop(0).partition("=")
        env[variable] = value
    if not equals or not _NAME.fullmatch(name) or not words:
        raise ConfigError(
            f"--system: {text!r} is not NAME=[VARIABLE=VALUE …] BASE [OPTION …]; for example "
            "--system 'x4=vllm --api-server-count 4'"
        )
    base = known.get(words[0])
    if base is None:
        valid = ", ".join(closest_first(words[0], known))
        raise ConfigError(f"--system: {name}: base {words[0]!r} is unknown. Valid: {valid}")
    plugins, args = _split_plugins(words[1:], base.plugins)
    return System(
        name, f"{rest.strip()}", plugins, base.args + args, {**base.env, **env}, base.needs
    )


def _split_plugins(
    words: list[str], plugins: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Take `--plugins a,b` or `--plugins=a,b` out of the options; the last one wins."""
    args: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option == "--plugins":
            value = value if equals else next(rest, "")
            plugins = tuple(name for name in value.split(",") if name and name != _SIM)
        else:
            args.append(word)
    return plugins, tuple(args)


def choose(names: Iterable[str], definitions: Iterable[str]) -> list[System]:
    """Return the systems called `names`, and those that `definitions` add if they are not named.

    Raises:
        ConfigError: an unknown name, the same one twice, or a definition that is none.
    """
    known = dict(BUILT_IN)
    added: list[str] = []
    for text in definitions:
        system = define(text, known)
        known[system.name] = system
        added.append(system.name)
    wanted = list(names)
    wanted += [name for name in dict.fromkeys(added) if name not in wanted]
    for name in wanted:
        if name not in known:
            valid = ", ".join(closest_first(name, known))
            raise ConfigError(
                f"--systems: {name!r} is unknown. Valid: {valid}; define others with --system"
            )
        if wanted.count(name) > 1:
            raise ConfigError(f"--systems: {name!r} is given twice. Name each system once.")
    if not wanted:
        raise ConfigError("--systems: no system is named. Valid: " + ", ".join(known))
    return [known[name] for name in wanted]


def command(system: System, target: Target, port: int) -> list[str]:
    """Return the command line that starts `system` on `port` of the loopback interface."""
    words = [vllm_executable(), "serve", str(target.model_dir)]
    words += ["--served-model-name", SERVED_NAME, "--host", "127.0.0.1", "--port", str(port)]
    plugins = [*system.plugins, *((_SIM,) if target.gpu else ())]
    if plugins:
        words += ["--plugins", ",".join(plugins)]
    if target.gpu:
        words += [f"--{_SIM}.gpu", target.gpu, f"--{_SIM}.model", target.preset or ""]
    return [*words, *target.server_args, *system.args]


def environment(system: System, target: Target) -> dict[str, str]:
    """Return the environment for `system`: this one, without what would turn plugins on in it."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name != "VLLM_PLUGINS" and not name.startswith("SCALELLM_")
    }
    env |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if system.needs == "--vllm-rs" and target.vllm_rs:
        env["VLLM_RUST_FRONTEND_PATH"] = str(target.vllm_rs)
    return env | dict(system.env)


def vllm_executable() -> str:
    """Return the path of the `vllm` command: this Python's own, or else the first in PATH.

    Raises:
        ConfigError: there is none.
    """
    own = Path(sys.executable).with_name("vllm")
    found = str(own) if own.is_file() else shutil.which("vllm")
    if not found:
        raise ConfigError(
            "there is no `vllm` command here. Install vLLM into this environment, or activate the "
            "one that has it."
        )
    return found
