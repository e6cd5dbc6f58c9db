"""y = x · Wᵀ with 8-bit weights and 8-bit rows (W8A8), int8 or fp8 (e4m3) on the tensor cores.

With few rows x comes in 16 bits and is rounded here: each program looks for its rows' largest
numbers first. It reads x twice, which is small and in the cache, and saves a launch and a trip to
memory. With many rows, or behind a norm, x comes rounded (`rounding.round_rows`,
`rms_norm_round`, `swiglu_round`).

Layout: weight int8 or float8_e4m3fn [N, K]; scales float32 [N].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import rounding, split_k

STEP = 128
"""Of K, per step of the loop."""

FUSED = 32
"""Rows up to which rounding inside the product is worth it."""


@triton.jit
def _multiply(
    x,
    row_scales,
    weight,
    scales,
    bias,
    y,
    parts,
    counters,
    rows,
    channels,
    width,
    ROUND: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    kind: tl.constexpr = weight.dtype.element_ty
    number = tl.cdiv(width, STEP)
    from_row = x + m.to(tl.int64)[:, None] * width
    if ROUND:
        top = tl.zeros((ROWS,), tl.float32)
        for step in range(number):
            k = step * STEP + tl.arange(0, STEP)
            inside = (m[:, None] < rows) & (k[None, :] < width)
            some = tl.load(from_row + k[None, :], inside, 0.0).to(tl.float32)
            top = tl.maximum(top, tl.max(tl.abs(some), 1))
        scale = rounding.scale_of(top, kind)
    else:
        scale = tl.load(row_scales + m, m < rows, 0.0)
    if kind == tl.int8:
        total = tl.zeros((ROWS, CHANNELS), tl.int32)
    else:
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(number * tl.program_id(2) // SPLIT, number * (tl.program_id(2) + 1) // SPLIT):
        k = step * STEP + tl.arange(0, STEP)
        inside = (m[:, None] < rows) & (k[None, :] < width)
        if ROUND:
            values = tl.load(from_row + k[None, :], inside, 0.0).to(tl.float32)
            some = rounding.rounded(values / scale[:, None], kind)
        else:
            some = tl.load(from_row + k[None, :], inside, 0.0)
        at = weight + n.to(tl.int64)[None, :] * width + k[:, None]
        theirs = tl.load(at, (k[:, None] < width) & (n[None, :] < channels), 0.0)
        total = tl.dot(some, theirs, total, out_dtype=total.dtype)
    split_k.end(
        total.to(tl.float32) * scale[:, None],
        scales,
        bias,
        y,
        parts,
        counters,
        rows,
        channels,
        m,
        n,
        SPLIT,
        HAS_BIAS,
    )


def w8a8(
    x: torch.Tensor,
    row_scales: torch.Tensor | None,
    weight: torch.Tensor,
    scales: torch.Tensor,
    counters: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return y [M, N] of `dtype`.

    Args:
        x: [M, K], contiguous: of the weight's dtype, or bfloat16 or float16.
        row_scales: float32 [M], of rows that come rounded; None: they are in 16 bits.
        weight, scales: see the module.
        counters: `split_k.counters` of this weight.
        bias: float32 [N].
        dtype: bfloat16 or float16.
    """
    if row_scales is None and x.shape[0] > FUSED:
        x, row_scales = rounding.round_rows(x, weight.dtype)
    y = torch.empty((x.shape[0], scales.shape[0]), dtype=dtype, device=x.device)
    tensors = (scales if row_scales is None else row_scales, weight, scales)
    fused = row_scales is None
    return split_k.launch(_multiply, x, tensors, counters, bias, y, STEP, STEP=STEP, ROUND=fused)
