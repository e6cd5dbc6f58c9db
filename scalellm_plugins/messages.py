"""Messages between frontends and engines, as they cross `ipc.channel`.

Rare ones are vLLM's own structs in its own codec (`MsgpackEncoder`: msgpack, large tensors as
frames of their own), so that nothing that a release adds is lost. A decode step is columns, see
`Step`.
"""

from __future__ import annotations

import msgspec

from .errors import ScaleLLMError

# From frontends. Frames: vLLM's, of the request type; ADD has a slot and a number (int64, see
# likes.py) and the prompt's token ids (int32[]; the request's own list is None then) before them.
# ADD_LIKE has the same two, and what is carried of a request that is like the one of that number.
ADD, ABORT, UTILITY, ADD_LIKE = 1, 2, 3, 4

# From engines. STEP: an encoded `Step`, no frames. FRAMED_STEP: a `Step`, then the frames of its
# EngineCoreOutputs. OUTPUTS: frames of EngineCoreOutputs.
STEP, FRAMED_STEP, OUTPUTS = 16, 17, 18

NO_SLOT = -1


class StepCorrupted(ScaleLLMError):
    """A record that is no step."""


class End(msgspec.Struct, array_like=True, gc=False):
    """A request's last output, when there is no more to say than this."""

    slot: int
    tokens: list[int]
    reason: int
    """vLLM's `FinishReason`."""
    stop: int | None
    """The stop token, where one of the request's own ended it."""


class Step(msgspec.Struct, array_like=True, gc=False):
    """A step's plain outputs: one new token each, of requests by the slots that they came with.

    As msgpack, one call on either side: for 256 outputs it takes a third of the time of packing
    int32 columns from lists and unpacking them to lists, and two thirds of the bytes.
    """

    timestamp: float
    """Of the step, seconds, the engine's monotonic clock."""
    slots: list[int] | None
    """None: those of this channel's step before, which is what most steps have."""
    tokens: list[int]
    ends: list[End] | None = None
    general: bytes | None = None
    """A packed `EngineCoreOutputs` with what columns cannot say."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Step)

encode_step = _encoder.encode


def decode_step(data: bytes | memoryview) -> Step:
    """Decode a step; nothing of `data` is kept.

    Raises:
        StepCorrupted: it is none, or its columns differ in length.
    """
    try:
        step = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StepCorrupted(f"step of {len(data)} bytes: {error}") from None
    if step.slots is not None and len(step.slots) != len(step.tokens):
        raise StepCorrupted(f"step of {len(step.slots)} slots and {len(step.tokens)} tokens")
    return step
