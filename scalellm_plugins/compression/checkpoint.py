"""A Hugging Face checkpoint on disk: one file or shards with an index, checked by headers alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from scalellm_plugins.errors import CheckpointError

from .container import TensorSpec, read_header
from .families import Family, family_of, place_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32")
_NUMBERED = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


class Checkpoint(msgspec.Struct, frozen=True):
    """A checked checkpoint.

    Attributes:
        folder: where it is.
        config: config.json.
        family: what is known about the architecture.
        shards: {file name: {tensor name: spec}}.
    """

    folder: Path
    config: dict[str, Any]
    family: Family
    shards: dict[str, dict[str, TensorSpec]]

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of every shard."""
        return {name: spec for shard in self.shards.values() for name, spec in shard.items()}

    @property
    def nbytes(self) -> int:
        """Size of the weights."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def channels(self) -> int:
        """Channels of each MLP."""
        return int(self.config["intermediate_size"])

    def fingerprint(self) -> str:
        """A hash that changes with the configuration, and with a shard's name, size or date."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.shards):
            state = (self.folder / name).stat()
            digest.update(f"{name} {state.st_size} {state.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config, index and headers, and hold them against each other.

    Raises:
        CheckpointError: something is missing, damaged or contradicts something else, or nothing
            is known about the architecture. The message names the file or the tensor.
    """
    config = _json(folder / "config.json")
    family = family_of(config)
    for key in ("num_hidden_layers", "intermediate_size"):
        if not isinstance(config.get(key), int):
            raise CheckpointError(f"{folder / 'config.json'} has no number {key!r}")
    checkpoint = Checkpoint(folder, config, family, _shards(folder))
    _check_tensors(checkpoint)
    return checkpoint


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())  # UTF-8, whatever the locale
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: this is no Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return document


def _shards(folder: Path) -> dict[str, dict[str, TensorSpec]]:
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{_instead(folder)}")
        return {SINGLE: read_header(folder / SINGLE)}
    listed = _json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    if gone := [n for n in _values(listed) if not (folder / _plain(folder, n)).exists()]:
        raise CheckpointError(
            f"{folder / gone[0]} is missing, which {INDEX} names ({len(gone)} of "
            f"{len(_values(listed))} files are): copy or download {', '.join(gone[:5])} again"
        )
    shards = {name: read_header(folder / name) for name in _values(listed)}
    _check_index(folder, listed, shards)
    return shards


def _instead(folder: Path) -> str:
    """What there is instead of what is read, and the remedy."""
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if numbered := next(filter(None, map(_NUMBERED.fullmatch, shards)), None):
        count = int(numbered[2])
        named = [f"{numbered[1]}-{i:05d}-of-{numbered[2]}.safetensors" for i in range(1, count + 1)]
        gone = [INDEX, *(name for name in named if name not in shards)]
        return f", but shards: copy or download {', '.join(gone[:5])} again"
    if others := shards + sorted(path.name for path in folder.glob("*.bin")):
        return (
            f", and {', '.join(others[:3])} is not read: load and save the model with "
            "transformers, which writes those"
        )
    return ": copy or download the weights, too"


def _values(listed: Mapping[str, Any]) -> list[str]:
    return sorted({str(name) for name in listed.values()})


def _plain(folder: Path, name: str) -> str:
    """A shard's name may not lead out of the folder: OUT would be written elsewhere, too."""
    if Path(name).name != name:
        raise CheckpointError(f"{folder / INDEX} names {name!r}, which is no file name")
    return name


def _check_index(
    folder: Path, listed: Mapping[str, Any], shards: Mapping[str, Mapping[str, TensorSpec]]
) -> None:
    for tensor, shard in listed.items():
        if tensor not in shards[shard]:
            raise CheckpointError(
                f"{INDEX} in {folder} says that {tensor} is in {shard}, which does not hold it"
            )
    for shard, tensors in shards.items():
        for tensor in tensors:
            if listed.get(tensor) != shard:
                raise CheckpointError(
                    f"{folder / shard} holds {tensor}, which {INDEX} does not say"
                )


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Every tensor that the configuration promises is there, and matrices have the right width."""
    tensors, family = checkpoint.tensors, checkpoint.family
    for name in family.promised(checkpoint.config):
        spec = tensors.get(name)
        if spec is None:
            raise CheckpointError(
                f"{checkpoint.folder} lacks {name}, which its config promises: copy or download "
                "the model again"
            )
        matrix = _is_matrix(family, name)
        if len(spec.shape) != 1 + matrix or spec.dtype not in FLOATS:
            raise CheckpointError(
                f"{name} is {spec.dtype} of shape {list(spec.shape)}: a "
                f"{'matrix' if matrix else 'vector'} in {', '.join(FLOATS)} was expected"
            )
        if (place := place_of(name)) is not None:
            _check_width(checkpoint, name, place.module, spec)
    highest = max((place.layer for name in tensors if (place := place_of(name))), default=-1)
    if highest >= checkpoint.layers:
        raise CheckpointError(
            f"{checkpoint.folder} holds layer {highest}, its config says {checkpoint.layers} layers"
        )


def _is_matrix(family: Family, name: str) -> bool:
    if (place := place_of(name)) is None:
        return name != "model.norm.weight"
    return place.kind == "weight" and place.module in family.linears


def _check_width(checkpoint: Checkpoint, name: str, module: str, spec: TensorSpec) -> None:
    family, channels = checkpoint.family, checkpoint.channels
    if module in family.rows:
        found, expected = spec.shape[0], channels * family.rows[module]
    elif module == family.columns and len(spec.shape) == 2:
        found, expected = spec.shape[1], channels
    else:
        return
    if found != expected:
        raise CheckpointError(
            f"{name} has the shape {list(spec.shape)}, but intermediate_size is {channels}"
        )
