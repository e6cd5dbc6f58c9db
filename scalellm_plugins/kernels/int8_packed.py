"""y = x · Wᵀ as in `int8_linear.py`, by vLLM's `int8_scaled_mm_with_quant`: one op for all of it.

It rounds the rows and multiplies in one call, where oneDNN's way takes two and a look into a cache
of primitives: 10 to 20 µs less, which is half the time of a layer of a million weights. For large
layers oneDNN is some 10 % faster. bfloat16 only: with float16 the op ends the process.

Rows that hold an infinity or NaN have no defined result; other rows are not affected by them.
"""

from __future__ import annotations

import torch

CHANNELS = 32
"""Channels of a block: N is a multiple of it, and so is K."""

MOST_WEIGHTS = 12 << 20
"""Layers with more weights are oneDNN's (measured: kernel_cost)."""


def fits(q: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether this op is there, takes a weight [N, K] for such rows, and is the better one."""
    return (
        dtype == torch.bfloat16
        and hasattr(torch.ops._C, "int8_scaled_mm_with_quant")
        and q.numel() <= MOST_WEIGHTS
        and q.shape[0] % CHANNELS == 0
        and q.shape[1] % CHANNELS == 0
    )


class Int8Packed:
    """A packed weight.

    Args:
        q: int8 [N, K], within ±127; `fits` says which shapes.
        scales: float32 [N].
    """

    def __init__(self, q: torch.Tensor, scales: torch.Tensor) -> None:
        self.out_features = q.shape[0]
        self.weight = torch.ops._C.convert_weight_packed(q.contiguous())
        self.scales = scales.contiguous()

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y [M, N] for x [M, K], both bfloat16, and bias float32 [N]."""
        y: torch.Tensor = torch.ops._C.int8_scaled_mm_with_quant(
            x.contiguous(), self.weight, self.scales, bias, x.dtype, True
        )
        return y
