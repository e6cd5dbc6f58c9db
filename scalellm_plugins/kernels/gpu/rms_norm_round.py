"""RMSNorm and rounding to 8 bits in one pass: no norm goes to memory in 16 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import rounding


@triton.jit
def _norm_row(
    x,
    residual,
    weight,
    q,
    scales,
    epsilon,
    width,
    LENGTH: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0)
    k = tl.arange(0, LENGTH)
    at = tl.cast(row, tl.int64) * width + k
    values = tl.load(x + at, k < width, 0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + at, k < width, 0.0).to(tl.float32)
        tl.store(residual + at, values.to(residual.dtype.element_ty), k < width)
    mean = tl.sum(values * values, 0) / width
    values *= tl.rsqrt(mean + epsilon) * tl.load(weight + k, k < width, 0.0).to(tl.float32)
    rounding.store_rounded(values, k, width, q, scales, row)


def rms_norm_round(
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    kind: torch.dtype,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x · weight / √(mean of x² + ε), rounded as `rounding.round_rows` does.

    Args:
        x: bfloat16 or float16 [M, K], contiguous.
        weight: [K].
        epsilon: ε.
        kind: int8 or float8_e4m3fn.
        residual: [M, K]; x is added to it in place, and the sum (before it is stored in 16 bits) is
            what is normalised.
    """
    q, scales = rounding.empty(x.shape[0], x.shape[1], kind, x)
    if x.shape[0]:
        length = triton.next_power_of_2(x.shape[1])
        _norm_row[(x.shape[0],)](
            x,
            x if residual is None else residual,
            weight,
            q,
            scales,
            epsilon,
            x.shape[1],
            LENGTH=length,
            ADD=residual is not None,
            num_warps=rounding.warps(length),
        )
    return q, scales
