"""Which layer gets how many bits: by its name, its shape and what it is. Pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scalellm_plugins.config import QuantizationConfig
from scalellm_plugins.kernels import registry

from .asked import Method, may_name_experts, mixture
from .weights import group_for


@dataclass(frozen=True)
class Plan:
    """What becomes of one layer. `group` is of 4 bits; 16 bits: it stays as it is."""

    bits: Literal[4, 8, 16]
    group: int = 0
    why: str = ""
    round_rows: bool = False
    """Whether activations get 8 bits, too, where the device leaves a choice."""


def patterns(text: str | None) -> tuple[str, ...]:
    """Split an option such as "*.o_proj,model.layers.0.*" into its patterns."""
    return tuple(filter(None, map(str.strip, (text or "").split(","))))


def names_of(prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a layer's name and, where vLLM fused it, those that the checkpoint has for its parts.

    model.layers.0.self_attn.qkv_proj is also q_proj, k_proj and v_proj in the same place.
    """
    stem, dot, last = prefix.rpartition(".")
    return [prefix, *(f"{stem}{dot}{part}" for part in packed.get(last, ()))]


def matches(names: Iterable[str], globs: Sequence[str]) -> bool:
    """Whether one of the names is as one of the patterns says, with * for any text."""
    return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)


def plan(
    method: Method,
    options: QuantizationConfig,
    names: Sequence[str],
    out_features: int,
    in_features: int,
    device: str = "cpu",
) -> Plan:
    """Return what becomes of a linear layer whose share on this device is [out, in] features."""
    if matches(names, patterns(options.skip)):
        return Plan(16, why="scalellm.quantization.skip")
    if method != "scalellm_int4":
        return Plan(8, round_rows=method == "scalellm_w8a8")
    if matches(names, patterns(options.keep_8bit)):
        return Plan(8, why="scalellm.quantization.keep_8bit")
    group = group_for(in_features, options.group_size)
    if not registry.fits("int4", out_features, in_features, group, device):
        return Plan(8, why=f"no group fits {in_features} inputs")
    return Plan(4, group)


def head_plan(method: Method, options: QuantizationConfig, prefix: str) -> Plan:
    """Return what becomes of the output layer where it is to have 8 bits: `skip` goes before."""
    if matches([prefix], patterns(options.skip)):
        return Plan(16, why="scalellm.quantization.skip")
    return Plan(8, round_rows=method == "scalellm_w8a8")


def refuse_experts(method: Method, options: QuantizationConfig, prefix: str) -> None:
    """Raise for a mixture of experts that is not to be skipped.

    Raises:
        ConfigError: its experts would silently stay in 16 bits.
    """
    if not matches([prefix], patterns(options.skip)):
        raise mixture(method, prefix)


def refuse_experts_early(method: Method, options: QuantizationConfig, model: str) -> None:
    """Raise for a model of which only its config.json is known, if none of the patterns can help.

    Raises:
        ConfigError: as `refuse_experts` would, half a minute later.
    """
    if not may_name_experts(patterns(options.skip)):
        raise mixture(method, model)
