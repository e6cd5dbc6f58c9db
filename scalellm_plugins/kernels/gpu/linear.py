"""A packed weight on a GPU, by kind, as `registry` gives it out.

torch.compile sees each product as one opaque op of `torch.ops.scalellm`.
"""

from __future__ import annotations

import torch

from . import int4_weight_only as four
from . import int8_weight_only as eight
from . import split_k, w8a8


class GpuInt8:
    """8-bit weights, rows in 16 bits.

    Args:
        q: int8 [N, K].
        scales: float32 [N].
    """

    def __init__(self, q: torch.Tensor, scales: torch.Tensor) -> None:
        self.out_features = q.shape[0]
        self._tensors = (q, scales, split_k.counters(q.shape[0], q.device))

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y [M, N] for x [M, K], bfloat16 or float16, and bias float32 [N]."""
        y: torch.Tensor = torch.ops.scalellm.gpu_int8(x, *self._tensors, bias)
        return y


class GpuRoundedRows:
    """8-bit weights, rows rounded to 8 bits as they come.

    Args:
        q: int8 or float8_e4m3fn [N, K].
        scales: float32 [N].
    """

    def __init__(self, q: torch.Tensor, scales: torch.Tensor) -> None:
        self.out_features = q.shape[0]
        self._tensors = (q, scales, split_k.counters(q.shape[0], q.device))

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y [M, N] for x [M, K], bfloat16 or float16, and bias float32 [N]."""
        y: torch.Tensor = torch.ops.scalellm.gpu_w8a8(x, *self._tensors, bias)
        return y


class GpuInt4:
    """4-bit weights in groups along K, rows in 16 bits. For shapes that `registry.fits`.

    Args:
        q: uint8 [N, K] in 0..15.
        zeros, multipliers: int8 [N, K // group].
        steps: float32 [N].
    """

    def __init__(
        self,
        q: torch.Tensor,
        zeros: torch.Tensor,
        multipliers: torch.Tensor,
        steps: torch.Tensor,
    ) -> None:
        self.out_features = q.shape[0]
        self._tensors = (
            four.pack(q),
            zeros.t().contiguous(),
            multipliers.t().contiguous(),
            steps,
            split_k.counters(q.shape[0], q.device),
        )

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y [M, N] for x [M, K], bfloat16 or float16, and bias float32 [N]."""
        y: torch.Tensor = torch.ops.scalellm.gpu_int4(x, *self._tensors, bias)
        return y


def _int8(x, q, scales, counters, bias):
    return eight.int8_weight_only(x.contiguous(), q, scales, counters, bias)


def _w8a8(x, q, scales, counters, bias):
    return w8a8.w8a8(x.contiguous(), None, q, scales, counters, bias, x.dtype)


def _int4(x, words, zeros, multipliers, steps, counters, bias):
    return four.int4_weight_only(x.contiguous(), words, zeros, multipliers, steps, counters, bias)


def _fake(x, *others):
    return x.new_empty((x.shape[0], others[-3].shape[0]))  # scales or steps


_library = torch.library.Library("scalellm", "FRAGMENT")
for _name, _tensors, _call in (
    ("gpu_int8", "Tensor q, Tensor scales", _int8),
    ("gpu_w8a8", "Tensor q, Tensor scales", _w8a8),
    ("gpu_int4", "Tensor words, Tensor zeros, Tensor multipliers, Tensor steps", _int4),
):
    # Counters change and are as before when the product is there.
    _library.define(f"{_name}(Tensor x, {_tensors}, Tensor counters, Tensor? bias) -> Tensor")
    _library.impl(_name, _call, "CUDA")
    _library.impl(_name, _call, "CPU")  # Triton's interpreter
    torch.library.register_fake(f"scalellm::{_name}", _fake, lib=_library)
