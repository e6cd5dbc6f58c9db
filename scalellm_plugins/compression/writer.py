"""The pass over the weights: read a tensor, cut it, make it integers, write it, forget it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from scalellm_plugins.errors import CheckpointError

from .checkpoint import INDEX, SINGLE, Checkpoint
from .container import Writer, writing
from .journal import Journal, write_whole
from .plan import Step
from .progress import track
from .quantize import Quantized, pack, quantize
from .recipe import CHANNEL, SCHEMES, Recipe

NOT_COPIED = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json", "config.json")
"""Weights in whatever form, and what is written anew. The rest of MODEL (tokenizer, templates,
licence) belongs to OUT, too."""


def write_shards(
    checkpoint: Checkpoint, recipe: Recipe, plan: Mapping[str, tuple[Step, ...]], journal: Journal
) -> None:
    """Write every shard that is not there yet; in memory are one tensor and what it becomes.

    Raises:
        CheckpointError: a tensor cannot be quantized.
    """
    todo = [shard for shard in plan if not journal.has(shard)]
    work = ((shard, step) for shard in todo for step in plan[shard])
    total = sum(len(plan[shard]) for shard in todo)
    tracked = track(work, total, "tensors")
    for shard in todo:
        specs = [spec for step in plan[shard] for spec in step.outputs]
        with (
            safe_open(checkpoint.folder / shard, "pt") as source,
            Writer(journal.folder / shard, specs) as target,
        ):
            for _ in plan[shard]:
                _, step = next(tracked)
                for name, tensor in results(recipe, step, source.get_tensor(step.source)):
                    target.write(name, _bytes_of(tensor))
        journal.wrote(shard)
    next(tracked, None)  # lets the bar end


def results(recipe: Recipe, step: Step, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what is written for a tensor of MODEL."""
    for axis, kept in enumerate((step.rows, step.columns)):
        if kept is not None:
            tensor = tensor.index_select(axis, torch.tensor(kept))
    if not step.quantized:
        yield step.target, tensor
        return
    bits = SCHEMES[recipe.scheme].bits
    size = tensor.shape[1] if recipe.group_size == CHANNEL else recipe.group_size
    try:
        made = quantize(tensor, bits, size, recipe.symmetric)
    except ValueError as error:
        raise CheckpointError(f"{step.source}: {error}") from None
    yield from _stored(recipe, step.target.removesuffix(".weight"), made)


def _stored(recipe: Recipe, module: str, made: Quantized) -> Iterator[tuple[str, Tensor]]:
    scheme = SCHEMES[recipe.scheme]
    yield f"{module}.weight_scale", made.scales
    if scheme.activations:
        yield f"{module}.weight", made.codes
        return
    yield f"{module}.weight_packed", pack(made.codes, scheme.bits)
    yield f"{module}.weight_shape", torch.tensor(made.codes.shape, dtype=torch.int64)
    if made.zero_points is not None:
        yield f"{module}.weight_zero_point", pack(made.zero_points, scheme.bits, axis=0)


def _bytes_of(tensor: Tensor) -> memoryview:
    # numpy has no bf16, but bytes it has.
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write_rest(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    plan: Mapping[str, tuple[Step, ...]],
    folder: Path,
) -> None:
    """Write config.json and the index, and copy the tokenizer and what else MODEL has."""
    for path in sorted(checkpoint.folder.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in NOT_COPIED):
            with writing(folder / path.name):
                shutil.copyfile(path, folder / path.name)
    write_whole(folder / "config.json", _json(config))
    if list(plan) != [SINGLE]:
        written = [
            (spec, shard)
            for shard, steps in plan.items()
            for step in steps
            for spec in step.outputs
        ]
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec, _ in written)},
            "weight_map": {spec.name: shard for spec, shard in written},
        }
        write_whole(folder / INDEX, _json(index))


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
