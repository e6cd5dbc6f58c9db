"""The safetensors format, as far as it is needed to write one tensor at a time.

The library saves a dict of tensors that are all in memory. A file is eight bytes (length of the
header, little endian), the header (JSON: name → dtype, shape, offsets) and the bytes; shapes are
known before the first tensor is computed, so each can be written where it belongs and forgotten.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from scalellm_plugins.errors import CheckpointError, OutputError

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
LARGEST_HEADER = 100_000_000
"""Bytes; what the library accepts, so that a damaged length is not believed."""


class TensorSpec(msgspec.Struct, frozen=True):
    """Name, dtype (the format's word for it: "BF16") and shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Every tensor of a file, by name.

    Raises:
        CheckpointError: the file is missing, cut short, longer than it says, or no safetensors.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} ({size} bytes) is cut short or is no safetensors file"
                )
            entries = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}") from None
    return _specs(path, entries, size - 8 - length)


def _specs(path: Path, entries: Any, body: int) -> dict[str, TensorSpec]:
    found, end = {}, 0
    try:
        entries.pop("__metadata__", None)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            spec = TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
            if spec.dtype not in ITEM_BYTES:
                raise CheckpointError(f"{path}: {name} has the unknown dtype {spec.dtype}")
            if entry["data_offsets"] != [end, end + spec.nbytes]:
                raise CheckpointError(
                    f"{path}: the header's offsets of {name} do not fit its shape"
                )
            end += spec.nbytes
            found[name] = spec
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the header is damaged ({error!r})") from None
    if end != body:
        raise CheckpointError(
            f"{path} is damaged: its header describes {end} bytes of tensors, the file has {body}. "
            "Copy or download it again."
        )
    return found


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file could not be written, and what helps; the system's error names no file.

    Raises:
        OutputError: instead of OSError.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some room there" if full else "mend that"
        raise OutputError(
            f"{path} cannot be written ({error}): {remedy}; then the same command goes on"
        ) from None


class Writer:
    """A file whose tensors may be written in any order; it has its name only when all are there.

    As a context manager: `with Writer(path, specs) as file: file.write(name, data)`. Left by an
    exception, it leaves nothing behind.

    Raises:
        OutputError: there is no room, or no right to write.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        # The widest dtype first, as the library has it: readers map the file, and a tensor must
        # begin at a multiple of its items' size.
        ordered = sorted(specs, key=lambda spec: (-ITEM_BYTES[spec.dtype], spec.name))
        self._missing = {spec.name: spec for spec in ordered}
        self._starts, header = _layout(ordered)
        with writing(path):
            self._file = self._temporary.open("wb")
            self._file.write(header)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a tensor's bytes: C order, little endian."""
        spec = self._missing.pop(name)
        assert len(data) == spec.nbytes, f"{name}: {len(data)} bytes for {spec}"
        with writing(self._path):
            self._file.seek(self._starts[name])
            self._file.write(data)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                assert not self._missing, f"never written: {list(self._missing)}"
                with writing(self._path):
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._file.close()
                    self._temporary.replace(self._path)
        finally:
            with suppress(OSError):  # on a full disk, what is buffered cannot be written, either
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def _layout(specs: Iterable[TensorSpec]) -> tuple[Mapping[str, int], bytes]:
    """{name: offset in the file}, and the bytes of length and header."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for spec in specs:
        offsets[spec.name] = end
        span = [end, end + spec.nbytes]
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": span}
        end += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return {name: start + at for name, at in offsets.items()}, len(text).to_bytes(
        8, "little"
    ) + text
