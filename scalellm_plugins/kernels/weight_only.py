"""y = x · Wᵀ with 8-bit or 4-bit weights and rows of x as they are (W8A16, W4A16): torch's own ops.

For processors without AVX512: there oneDNN's int8 product has a slow way only, vLLM's build has no
4-bit op, and bf16 has no instructions, so that these win at every number of rows (measured:
kernel_cost --build avx2). Elsewhere bf16 beats them from a few rows on.
"""

from __future__ import annotations

import torch

CHANNELS = 16
"""The 4-bit op takes whole blocks of so many; others are filled up."""


def preferred() -> bool:
    """Whether these are the kernels for this processor."""
    return "AVX512" not in torch.backends.cpu.get_cpu_capability()


class Int8WeightOnly:
    """A weight.

    Args:
        q: int8 [N, K].
        scales: float32 [N], numbers that bfloat16 has.
        dtype: of x and y, bfloat16 or float16.
    """

    def __init__(self, q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        self.out_features = q.shape[0]
        self._q = q.contiguous()
        self._scales = scales.to(dtype)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y [M, N] for x [M, K] of the dtype that was given, and bias float32 [N]."""
        y = torch._weight_int8pack_mm(x.contiguous(), self._q, self._scales)
        return y if bias is None else y + bias.to(y.dtype)


class Int4WeightOnly:
    """A packed weight.

    Args:
        q: uint8 [N, K] in 0..15.
        zeros, multipliers: int8 [N, K // group]; group is 32, 64, 128 or 256.
        steps: float32 [N].
        dtype: of x and y, bfloat16 or float16.
    """

    def __init__(
        self,
        q: torch.Tensor,
        zeros: torch.Tensor,
        multipliers: torch.Tensor,
        steps: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.out_features = q.shape[0]
        self._group = q.shape[1] // zeros.shape[1]
        scales = multipliers * steps[:, None]
        # The op's weight is (q - 8) · scale + zero.
        both = torch.stack([scales, (8 - zeros.float()) * scales], dim=2)
        padding = -self.out_features % CHANNELS
        if padding:
            q = torch.cat([q, q.new_zeros((padding, q.shape[1]))])
            both = torch.cat([both, both.new_zeros((padding, *both.shape[1:]))])
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        self._both = both.transpose(0, 1).contiguous().to(dtype)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y [M, N] for x [M, K] of the dtype that was given, and bias float32 [N]."""
        op = torch.ops.aten._weight_int4pack_mm_for_cpu
        y: torch.Tensor = op(x.contiguous(), self._packed, self._group, self._both)
        y = y[:, : self.out_features].contiguous()
        return y if bias is None else y + bias.to(y.dtype)
