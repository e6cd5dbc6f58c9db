"""y = x · Wᵀ with 4-bit weights in groups along K, and rows of x rounded to 8 bits (W4A8).

A weight is (q - zero) · multiplier · step: q in 0..15, zero and multiplier integers per group,
step one number per channel. So it is an 8-bit integer times its channel's step, and the same one
at every number of rows (two-level scales as in QServe, arXiv 2405.04532). By rows:

- 1 to 4, bytes bind: vLLM's `int4_scaled_mm_cpu`, from 4-bit weights to registers.
- more, arithmetic binds: `fused.py` unpacks to 8 bits in the cache and multiplies from there.
- Where that is not to be had, the op again: to `_PIECES` rows four at a time, weights coming from
  memory each time, and with more rows it unpacks block by block, at bf16's speed.

Layout, that of `int4_scaled_mm_cpu`: blocks of 32 channels by up to 128 of K, a block's bytes
[K/4, 2, 8, 4] (k, half of the channels, channel, k), low nibble channel c and high nibble channel
c + 8 of a half, then the 32 sums (q - zero) over the block as int32.

Rows that hold an infinity or NaN have no defined result; other rows are not affected by them.
"""

from __future__ import annotations

import torch

from . import fused

CHANNELS = 32
"""Channels of a block."""

_SUMS = 4 * CHANNELS
"""Bytes of a block's sums."""

_FEW = 4
"""Rows that the op multiplies straight from 4-bit weights."""

_PIECES = 16
"""Rows up to which pieces of `_FEW` are faster than unpacking (measured: kernel_cost)."""


class Int4Linear:
    """A packed weight [N, K]. N is padded to whole blocks; K is a multiple of 32.

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
        padding = -self.out_features % CHANNELS
        if padding:
            q, zeros, multipliers, steps = (
                torch.cat([tensor, tensor.new_zeros((padding, *tensor.shape[1:]))])
                for tensor in (q, zeros, multipliers, steps)
            )
        offsets = -zeros.int() * multipliers.int()  # modulo 256 below: so does `fused.py`
        weight, sums = _pack(q, zeros, multipliers)
        self.tensors = (
            weight,
            _by_block(zeros),
            _by_block(multipliers.float() * steps[:, None]),
            _by_block(multipliers),
            _by_block(offsets.to(torch.uint8).view(torch.int8)),
            sums,
            steps,
        )

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y [M, N] for x [M, K], bfloat16 or float16, and bias float32 [N]."""
        call = torch.ops.scalellm.int4_linear if torch.compiler.is_compiling() else int4_linear
        y: torch.Tensor = call(x, *self.tensors, self.out_features, bias)
        return y


def int4_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    multipliers: torch.Tensor,
    offsets: torch.Tensor,
    sums: torch.Tensor,
    steps: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply by the weight that the tensors of an `Int4Linear` are."""
    padded = steps.shape[0]
    x = x.contiguous()
    rows = x.shape[0]
    if rows > _FEW and fused.available():
        bias = torch.zeros(out_features, dtype=torch.float32) if bias is None else bias.contiguous()
        return fused.multiply(x, weight, multipliers, offsets, sums, steps, bias)
    if bias is not None and padded != out_features:
        bias = torch.nn.functional.pad(bias, (0, padded - out_features))
    if _FEW < rows <= _PIECES:
        y = x.new_empty((rows, padded))
        for first in range(0, rows, _FEW):
            piece = slice(first, first + _FEW)
            y[piece] = torch.ops._C.int4_scaled_mm_cpu(x[piece], weight, zeros, scales, bias)
    else:
        y = torch.ops._C.int4_scaled_mm_cpu(x, weight, zeros, scales, bias)
    return y if padded == out_features else y[:, :out_features].contiguous()


def _pack(
    q: torch.Tensor, zeros: torch.Tensor, multipliers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the blocks, uint8 [N / 32, K / depth, depth · 16 + 128], and for 8 bits the sums.

    The latter are 128 times each channel's sum, int32 [N / 32, 32]: what has to be taken off after
    rows of x were moved from ±127 to 1..255.
    """
    channels, width = q.shape
    group = width // zeros.shape[1]
    depth = min(group, 128)
    count = channels // CHANNELS
    packed = torch.empty((count, width // depth, depth * 16 + _SUMS), dtype=torch.uint8)
    sums = torch.empty((count, CHANNELS), dtype=torch.int32)
    for block in range(count):
        rows = slice(block * CHANNELS, (block + 1) * CHANNELS)
        numbers = q[rows].view(2, 2, 8, width // depth, depth // 4, 4)
        nibbles = numbers[:, 0] | (numbers[:, 1] << 4)  # [2, 8, K / depth, depth / 4, 4]
        packed[block, :, :-_SUMS] = nibbles.permute(2, 3, 0, 1, 4).reshape(-1, depth * 16)
        parts = q[rows].view(CHANNELS, -1, depth).sum(-1, dtype=torch.int32)
        parts -= zeros[rows].int().repeat_interleave(group // depth, dim=1) * depth
        packed[block, :, -_SUMS:] = parts.t().contiguous().view(torch.uint8)
        scaled = parts * multipliers[rows].int().repeat_interleave(group // depth, dim=1)
        sums[block] = 128 * scaled.sum(1, dtype=torch.int32)
    return packed, sums


def _by_block(per_group: torch.Tensor) -> torch.Tensor:
    """Return [N, groups] as [N / 32, groups, 32]."""
    return per_group.view(-1, CHANNELS, per_group.shape[1]).transpose(1, 2).contiguous()


# torch.compile sees one opaque op. (`torch.library.custom_op` would cost each call 10 µs more.)
_library = torch.library.Library("scalellm", "FRAGMENT")
_library.define(
    "int4_linear(Tensor x, Tensor weight, Tensor zeros, Tensor scales, Tensor multipliers, "
    "Tensor offsets, Tensor sums, Tensor steps, int out_features, Tensor? bias) -> Tensor"
)
_library.impl("int4_linear", int4_linear, "CPU")
torch.library.register_fake(
    "scalellm::int4_linear",
    lambda x, *tensors: x.new_empty((x.shape[0], tensors[-2])),
    lib=_library,
)
