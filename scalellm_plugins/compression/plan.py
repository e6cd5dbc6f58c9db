"""What becomes of every tensor. Pure: names and shapes only, so that sizes are known beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from scalellm_plugins.errors import ConfigError

from .checkpoint import Checkpoint
from .container import TensorSpec
from .families import Family, Place, place_of
from .recipe import CHANNEL, GROUP_SIZES, PACKED_MULTIPLE, SCHEMES, WIDTH_MULTIPLE, Recipe

PACK_BITS = 32
"""Integers of `weight_packed` are words of so many bits."""


class Selection(msgspec.Struct, frozen=True):
    """What was chosen from calibration text.

    Attributes:
        layers: decoder layers that stay, by their old numbers, ascending.
        channels: {old layer: MLP channels that stay, ascending}; empty: all of them.
        influence: block influence of every layer, by which `layers` were chosen.
        kept_importance: {old layer: share of the channels' summed importance that stays}.
    """

    layers: tuple[int, ...]
    channels: dict[int, tuple[int, ...]] = {}
    influence: tuple[float, ...] = ()
    kept_importance: dict[int, float] = {}


class Step(msgspec.Struct, frozen=True):
    """What becomes of one tensor.

    Attributes:
        source: its name in MODEL, `target` in OUT.
        rows, columns: those that stay; None: all.
        quantized: it becomes integers.
        outputs: what is written; for a tensor that is not quantized, one with the name `target`.
    """

    source: str
    target: str
    rows: tuple[int, ...] | None
    columns: tuple[int, ...] | None
    quantized: bool
    outputs: tuple[TensorSpec, ...]


def kept_channels(recipe: Recipe, channels: int) -> int:
    """How many channels of an MLP stay: a multiple of 64, and of the group size.

    Raises:
        ConfigError: none would.
    """
    if not recipe.prune_ffn:
        return channels
    group = recipe.group_size if recipe.scheme and recipe.group_size != CHANNEL else 1
    multiple = math.lcm(WIDTH_MULTIPLE, group)
    kept = min(round(channels * (1 - recipe.prune_ffn) / multiple) * multiple, channels)
    if kept < multiple or kept == channels:
        most = (channels - 1) // multiple * multiple
        usable = (
            f"from {1 - most / channels:.4g} (keeps {most}) to {1 - multiple / channels:.4g} "
            f"(keeps {multiple}) it can be cut"
            if most
            else "there are too few to cut any: leave --prune-ffn out"
        )
        raise ConfigError(
            f"--prune-ffn {recipe.prune_ffn:g}: {kept} of this model's {channels} channels would "
            f"stay, in steps of {multiple}; {usable}"
        )
    return kept


def steps(
    checkpoint: Checkpoint, recipe: Recipe, selection: Selection
) -> dict[str, tuple[Step, ...]]:
    """{shard: what becomes of its tensors}, without tensors and shards of which nothing stays."""
    numbers = {old: new for new, old in enumerate(selection.layers)}
    ignored = set(ignored_modules(checkpoint, recipe))
    planned = {}
    for shard, tensors in checkpoint.shards.items():
        chosen = []
        for spec in tensors.values():
            place = place_of(spec.name)
            if place is not None and place.layer not in numbers:
                continue
            chosen.append(_step(checkpoint, recipe, selection, numbers, ignored, spec))
        if chosen:
            planned[shard] = tuple(chosen)
    return planned


def _step(
    checkpoint: Checkpoint,
    recipe: Recipe,
    selection: Selection,
    numbers: dict[int, int],
    ignored: set[str],
    spec: TensorSpec,
) -> Step:
    place = place_of(spec.name)
    if place is None:
        return Step(spec.name, spec.name, None, None, False, (spec,))
    target = f"model.layers.{numbers[place.layer]}.{place.module}.{place.kind}"
    family = checkpoint.family
    rows, columns = _cuts(family, place, selection, checkpoint.channels)
    shape = list(spec.shape)
    for axis, kept in enumerate((rows, columns)):
        if kept is not None:
            shape[axis] = len(kept)
    cut = TensorSpec(target, spec.dtype, tuple(shape))
    module = spec.name.rpartition(".")[0]
    quantized = bool(recipe.scheme) and _is_linear(family, place) and module not in ignored
    if quantized:
        _check_fit(recipe, family, place, cut)
    outputs = quantized_specs(recipe, cut) if quantized else (cut,)
    return Step(spec.name, target, rows, columns, quantized, outputs)


def _is_linear(family: Family, place: Place) -> bool:
    return place.kind == "weight" and place.module in family.linears


def _cuts(
    family: Family, place: Place, selection: Selection, channels: int
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """(rows, columns) of a tensor that stay."""
    kept = selection.channels.get(place.layer)
    if kept is None:
        return None, None
    if place.module == family.columns and place.kind == "weight":
        return None, kept
    if times := family.rows.get(place.module):
        return tuple(i * channels + row for i in range(times) for row in kept), None
    return None, None


def _check_fit(recipe: Recipe, family: Family, place: Place, spec: TensorSpec) -> None:
    """Refuse a matrix that no kernel of vLLM takes, or that groups do not divide.

    Raises:
        ConfigError: says which options fit.
    """
    if SCHEMES[recipe.scheme].activations:
        return
    outputs, inputs = spec.shape
    uneven = inputs % PACKED_MULTIPLE or outputs % PACKED_MULTIPLE
    size = PACKED_MULTIPLE if recipe.group_size == CHANNEL else recipe.group_size
    if not uneven and inputs % size == 0:
        return
    (group,) = (group for group in family.fused if place.module in group)
    leave = " ".join(f"--ignore '*.{module}'" for module in group)
    if uneven:
        needs = f"multiples of {PACKED_MULTIPLE} in vLLM. Take --scheme w8a8, or {leave}"
    else:
        fits = max(n for n in GROUP_SIZES if n != CHANNEL and inputs % n == 0)
        needs = f"inputs in groups of {size}. Take --group-size {fits}, or {leave}"
    raise ConfigError(
        f"{spec.name} has {inputs} inputs and {outputs} outputs: --scheme {recipe.scheme} needs "
        f"{needs}."
    )


def quantized_specs(recipe: Recipe, spec: TensorSpec) -> tuple[TensorSpec, ...]:
    """What a matrix (out × in) that fits becomes in the compressed-tensors format."""
    scheme = SCHEMES[recipe.scheme]
    outputs, inputs = spec.shape
    size = inputs if recipe.group_size == CHANNEL else recipe.group_size
    per_word = PACK_BITS // scheme.bits
    packed = not scheme.activations
    module = spec.name.removesuffix(".weight")
    scales = TensorSpec(f"{module}.weight_scale", spec.dtype, (outputs, inputs // size))
    if not packed:
        return TensorSpec(spec.name, "I8", spec.shape), scales
    found = [
        TensorSpec(f"{module}.weight_packed", "I32", (outputs, inputs // per_word)),
        scales,
        TensorSpec(f"{module}.weight_shape", "I64", (2,)),
    ]
    if not recipe.symmetric:
        shape = (outputs // per_word, inputs // size)
        found.append(TensorSpec(f"{module}.weight_zero_point", "I32", shape))
    return tuple(found)


def ignored_modules(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """Linear layers of MODEL that match an `--ignore` pattern, by name.

    Raises:
        ConfigError: a pattern matches none, or a part of what vLLM runs as one layer, or they
            match all.
    """
    family = checkpoint.family
    names = {
        (layer, module): f"model.layers.{layer}.{module}"
        for layer in range(checkpoint.layers)
        for module in family.linears
    }
    for pattern in recipe.ignore:
        if not any(fnmatchcase(name, pattern) for name in (*names.values(), "lm_head")):
            raise ConfigError(
                f"--ignore {pattern}: no linear layer has such a name; "
                f"they look like {min(names.values())}"
            )
    found = {key for key, name in names.items() if any(fnmatchcase(name, p) for p in recipe.ignore)}
    for layer in range(checkpoint.layers):
        for group in family.fused:
            inside = [(layer, module) in found for module in group]
            if any(inside) and not all(inside):
                raise ConfigError(
                    f"--ignore leaves a part of {', '.join(group)} in layer {layer}: vLLM runs "
                    "them as one layer, so ignore all of them or none"
                )
    if len(found) == len(names):
        patterns = " ".join(f"--ignore {pattern!r}" for pattern in recipe.ignore)
        done = f"--scheme {recipe.scheme}" if recipe.scheme else f"--method {recipe.method}"
        raise ConfigError(
            f"{patterns} leaves nothing for {done}: every linear layer matches; name fewer, such "
            "as --ignore '*.down_proj'"
        )
    return sorted(names[key] for key in found)


def new_config(checkpoint: Checkpoint, recipe: Recipe, selection: Selection) -> dict[str, Any]:
    """config.json of OUT."""
    config = dict(checkpoint.config)
    config["num_hidden_layers"] = len(selection.layers)
    config["intermediate_size"] = kept_channels(recipe, checkpoint.channels)
    for key in checkpoint.family.per_layer:
        if isinstance(config.get(key), list):
            config[key] = [config[key][layer] for layer in selection.layers]
    if recipe.scheme:
        numbers = {old: new for new, old in enumerate(selection.layers)}
        ignored = _renamed(ignored_modules(checkpoint, recipe), numbers)
        config["quantization_config"] = quantization_config(recipe, ignored)
    return config


def _renamed(modules: Iterable[str], numbers: dict[int, int]) -> list[str]:
    places = [place_of(f"{module}.weight") for module in modules]
    return [
        f"model.layers.{numbers[place.layer]}.{place.module}"
        for place in places
        if place is not None and place.layer in numbers
    ]


def quantization_config(recipe: Recipe, ignored: Sequence[str]) -> dict[str, Any]:
    """The part of config.json from which a server knows the format (compressed-tensors 0.17).

    The embedding is no linear layer and needs no mention; `lm_head` is one for transformers.
    """
    scheme = SCHEMES[recipe.scheme]
    form = "int-quantized" if scheme.activations else "pack-quantized"
    channel = recipe.group_size == CHANNEL
    weights = {
        **_integers(scheme.bits, recipe.symmetric),
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else recipe.group_size,
        "dynamic": False,
    }
    inputs = _integers(8, True) | {"strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if scheme.activations else None,
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *ignored],
        "kv_cache_scheme": None,
    }


def _integers(bits: int, symmetric: bool) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric}
