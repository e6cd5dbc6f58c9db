"""SwiGLU and rounding to 8 bits in one pass, before an MLP's down projection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import rounding


@triton.jit
def _gate_row(x, q, scales, width, LENGTH: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, LENGTH)
    at = x + tl.cast(row, tl.int64) * width * 2 + k
    gate = tl.load(at, k < width, 0.0).to(tl.float32)
    up = tl.load(at + width, k < width, 0.0).to(tl.float32)
    rounding.store_rounded(gate * tl.sigmoid(gate) * up, k, width, q, scales, row)


def swiglu_round(x: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return SiLU(gate) · up, rounded as `rounding.round_rows` does: q [M, K], scales [M].

    x is bfloat16 or float16 [M, 2 K], contiguous: gate, then up, as vLLM's fused projection has
    them. `kind` is int8 or float8_e4m3fn.
    """
    width = x.shape[1] // 2
    q, scales = rounding.empty(x.shape[0], width, kind, x)
    if x.shape[0]:
        length = triton.next_power_of_2(width)
        _gate_row[(x.shape[0],)](x, q, scales, width, length, num_warps=rounding.warps(length))
    return q, scales
