"""y = x · Wᵀ with 8-bit weights, one scale per channel, and rows of x as they are (W8A16).

Layout: q int8 [N, K], so that a thread finds what it needs of a channel side by side, four in a
register; scales float32 [N].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import portable, split_k

STEP = 64
"""Of K, per step of the loop."""


@triton.jit
def _multiply(
    x,
    q,
    scales,
    bias,
    y,
    parts,
    counters,
    rows,
    channels,
    width,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    number = tl.cdiv(width, STEP)
    from_row = x + m.to(tl.int64)[:, None] * width
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(number * tl.program_id(2) // SPLIT, number * (tl.program_id(2) + 1) // SPLIT):
        k = step * STEP + tl.arange(0, STEP)
        some = tl.load(from_row + k[None, :], (m[:, None] < rows) & (k[None, :] < width), 0.0)
        at = q + n.to(tl.int64)[None, :] * width + k[:, None]
        weight = tl.load(at, (k[:, None] < width) & (n[None, :] < channels), 0)
        total = portable.dot(some, weight, total)
    split_k.end(total, scales, bias, y, parts, counters, rows, channels, m, n, SPLIT, HAS_BIAS)


def int8_weight_only(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    counters: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return y [M, N] of x's dtype (bfloat16 or float16).

    Args:
        x: [M, K], contiguous.
        q, scales: see the module.
        counters: `split_k.counters` of this weight.
        bias: float32 [N].
    """
    y = x.new_empty((x.shape[0], scales.shape[0]))
    return split_k.launch(_multiply, x, (q, scales), counters, bias, y, STEP, STEP=STEP)
