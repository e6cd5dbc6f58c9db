"""Rows rounded to 8 bits as they come: int8 or fp8 (e4m3), one scale per row, both symmetric.

What `rounded` does is used by every op that rounds: alone here, behind RMSNorm, behind SwiGLU, and
inside a product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import portable

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What a row's largest number becomes."""

_TO_WHOLE = tl.constexpr(12582912.0)
"""1.5 · 2²³: a float32 added to it has no room for a fraction, and is rounded to even."""


@triton.jit
def scale_of(top, KIND: tl.constexpr):
    """Return the scale for the largest magnitude `top`; zeros are divided by 1."""
    largest: tl.constexpr = 127.0 if tl.int8 == KIND else 448.0
    return tl.where(top > 0, top / largest, 1.0)


@triton.jit
def rounded(values, KIND: tl.constexpr):
    """Return float32 values, scaled already, in int8 or fp8."""
    if tl.int8 == KIND:
        result = ((values + _TO_WHOLE) - _TO_WHOLE).to(tl.int8)
    else:
        # A quotient may be a hair beyond what fp8 has, and would be a NaN there.
        result = portable.to_fp8(tl.minimum(tl.maximum(values, -448.0), 448.0), KIND)
    return result


@triton.jit
def store_rounded(values, k, width, q, scales, row):
    """Round a row of float32 `values`, 0 beyond `width`, to q [rows, width] and its scale."""
    scale = scale_of(tl.max(tl.abs(values), 0), q.dtype.element_ty)
    tl.store(scales + row, scale)
    at = q + tl.cast(row, tl.int64) * width + k
    tl.store(at, rounded(values / scale, q.dtype.element_ty), k < width)


@triton.jit
def _round_row(x, q, scales, width, LENGTH: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, LENGTH)
    values = tl.load(x + tl.cast(row, tl.int64) * width + k, k < width, 0.0).to(tl.float32)
    store_rounded(values, k, width, q, scales, row)


def round_rows(x: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q [M, K] of `kind` (int8 or float8_e4m3fn) and scales float32 [M]: x ≈ q · scale.

    x is bfloat16, float16 or float32 [M, K], contiguous. A row that holds an infinity or NaN has no
    defined result; other rows are not affected by it.
    """
    q, scales = empty(x.shape[0], x.shape[1], kind, x)
    if x.shape[0]:
        length = triton.next_power_of_2(x.shape[1])
        _round_row[(x.shape[0],)](x, q, scales, x.shape[1], length, num_warps=warps(length))
    return q, scales


def empty(
    rows: int, width: int, kind: torch.dtype, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return room for rounded rows and their scales."""
    q = torch.empty((rows, width), dtype=kind, device=like.device)
    return q, torch.empty(rows, dtype=torch.float32, device=like.device)


def warps(length: int) -> int:
    """Return how many warps a row of that length (a power of two) is worth: 8 numbers a thread."""
    return max(1, min(16, length // 256))
