"""Messages between frontends and engines, as they cross `ipc.channel`.

Rare ones are vLLM's own structs in its own codec (`MsgpackEncoder`: msgpack, large tensors as
frames of their own), so that nothing that a release adds is lost. A decode step is columns:

    timestamp  float64   of the step, seconds, the engine's monotonic clock
    count      uint32    outputs: n
    general    uint32    bytes of a packed `EngineCoreOutputs` with what columns cannot say
    slots      int32[n]  which request (the number that its frontend gave it)
    tokens     int32[n]  its new token
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from .errors import ScaleLLMError

# From frontends. Frames: vLLM's, of the request type; ADD has a slot (int64) and the prompt's token
# ids (int32[]; the request's own list is None then) before them.
ADD, ABORT, UTILITY = 1, 2, 3

# From engines. STEP: as above, no frames. FRAMED_STEP: columns, then frames of EngineCoreOutputs.
# OUTPUTS: frames of EngineCoreOutputs.
STEP, FRAMED_STEP, OUTPUTS = 16, 17, 18

NO_SLOT = -1
LAST_SLOT = 2**31 - 1

_HEADER = struct.Struct("<dII")


class StepCorrupted(ScaleLLMError):
    """A record that is no step."""


class Step(NamedTuple):
    """A step that was read. `general` is a view of the record."""

    timestamp: float
    slots: list[int]
    tokens: list[int]
    general: memoryview


def step_size(count: int, general: int) -> int:
    """Return the bytes of a step."""
    return _HEADER.size + 8 * count + general


def write_step(
    view: memoryview, timestamp: float, slots: Sequence[int], tokens: Sequence[int], general: bytes
) -> None:
    """Write a step into `step_size` bytes."""
    count = len(slots)
    _HEADER.pack_into(view, 0, timestamp, count, len(general))
    middle = _HEADER.size + 4 * count
    end = middle + 4 * count
    view[_HEADER.size : middle] = memoryview(array("i", slots)).cast("B")
    view[middle:end] = memoryview(array("i", tokens)).cast("B")
    if general:
        view[end:] = general


def read_step(view: memoryview) -> Step:
    """Read a step; the columns are copied, so only `general` needs the record.

    Raises:
        StepCorrupted: the sizes do not add up.
    """
    try:
        timestamp, count, general = _HEADER.unpack_from(view, 0)
    except struct.error as error:
        raise StepCorrupted(f"step of {len(view)} bytes: {error}") from None
    if step_size(count, general) != len(view):
        raise StepCorrupted(f"step of {len(view)} bytes says {count} outputs, {general} more bytes")
    middle = _HEADER.size + 4 * count
    end = middle + 4 * count
    slots = view[_HEADER.size : middle].cast("i").tolist()
    tokens = view[middle:end].cast("i").tolist()
    return Step(timestamp, slots, tokens, view[end:])
