"""y = x · Wᵀ as in `int4_tiles.py`, by vLLM's `int4_scaled_mm_cpu`: for processors with AMX.

Their matrix units multiply several times as much as vectors do, and the op uses them. Elsewhere it
is slower than bf16 from some rows on. (No processor with AMX has run our comparison: here it is
tested for what it computes.)

Layout: blocks of 32 channels by up to 128 of K, a block's bytes [K/4, 2, 8, 4] (k, half of the
channels, channel, k), low nibble channel c and high nibble channel c + 8 of a half, then the 32
sums (q - zero) over the block as int32.

Rows that hold an infinity or NaN have no defined result; other rows are not affected by them.
"""

from __future__ import annotations

import torch

CHANNELS = 32
"""Channels of a block."""

_SUMS = 4 * CHANNELS
"""Bytes of a block's sums."""


def preferred() -> bool:
    """Whether this processor has AMX, and vLLM's ops for it the one that is needed."""
    return bool(torch.cpu._is_amx_tile_supported()) and hasattr(torch.ops._C, "int4_scaled_mm_cpu")


class Int4Packed:
    """A packed weight [N, K]. N is filled up to whole blocks; K is a multiple of 32.

    Args:
        q: uint8 [N, K] in 0..15.
        zeros: int8 [N, K // group], in 0..15.
        scales: float32 [N, K // group].
    """

    def __init__(self, q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> None:
        self.out_features = q.shape[0]
        padding = (0, 0, 0, -self.out_features % CHANNELS)
        q, zeros, scales = (
            torch.nn.functional.pad(tensor, padding) for tensor in (q, zeros, scales)
        )
        self.tensors = (_pack(q, zeros), _by_block(zeros), _by_block(scales))

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y [M, N] for x [M, K], bfloat16 or float16, and bias float32 [N]."""
        padding = -self.out_features % CHANNELS
        if bias is not None and padding:
            bias = torch.nn.functional.pad(bias, (0, padding))
        # vLLM describes the op to torch.compile itself.
        op = torch.ops._C.int4_scaled_mm_cpu
        y: torch.Tensor = op(x.contiguous(), *self.tensors, bias)
        return y[:, : self.out_features].contiguous() if padding else y


def _pack(q: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return the blocks, uint8 [N / 32, K / depth, depth · 16 + 128]."""
    channels, width = q.shape
    group = width // zeros.shape[1]
    depth = min(group, 128)
    count = channels // CHANNELS
    packed = torch.empty((count, width // depth, depth * 16 + _SUMS), dtype=torch.uint8)
    for block in range(count):
        rows = slice(block * CHANNELS, (block + 1) * CHANNELS)
        numbers = q[rows].view(2, 2, 8, width // depth, depth // 4, 4)
        nibbles = numbers[:, 0] | (numbers[:, 1] << 4)  # [2, 8, K / depth, depth / 4, 4]
        packed[block, :, :-_SUMS] = nibbles.permute(2, 3, 0, 1, 4).reshape(-1, depth * 16)
        parts = q[rows].view(CHANNELS, -1, depth).sum(-1, dtype=torch.int32)
        parts -= zeros[rows].int().repeat_interleave(group // depth, dim=1) * depth
        packed[block, :, -_SUMS:] = parts.t().contiguous().view(torch.uint8)
    return packed


def _by_block(per_group: torch.Tensor) -> torch.Tensor:
    """Return [N, groups] as [N / 32, groups, 32]."""
    return per_group.view(-1, CHANNELS, per_group.shape[1]).transpose(1, 2).contiguous()
