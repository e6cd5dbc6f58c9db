"""y = x · Wᵀ with 4-bit weights in groups along K and rows of x as they are (W4A16).

A weight is (q - zero) · multiplier · step, as in `int4_linear.py`. It goes from memory to registers
and to the tensor cores without a detour: nibbles are packed so that each of a word's eight belongs
to another run of 16 along K, and a run is a product's inner dimension, so nothing is shuffled. A
nibble becomes a 16-bit float by setting the bits of an exponent (128 + q in bfloat16, 1024 + q in
float16: Kim et al., arXiv 2211.10017); what was added comes off with the zero, exactly. The group's
multiplier is applied to sums, not to weights.

Layout: words int32 [K / 128, 16, N], nibble i of [b, r, n] is q[n, 128 b + 16 i + r]; zeros and
multipliers int8 [K / group, N]; steps float32 [N].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import portable, split_k

BLOCK = 128
"""Of K, in a word's eight runs of 16. What fits: `registry.fits`, which does without Triton."""


def pack(q: torch.Tensor) -> torch.Tensor:
    """Return words int32 [K / 128, 16, N] of q uint8 [N, K] in 0..15."""
    channels, width = q.shape
    runs = q.view(channels, width // BLOCK, 8, 16).permute(1, 2, 3, 0)
    words = torch.zeros((width // BLOCK, 16, channels), dtype=torch.int32, device=q.device)
    for place in range(8):
        words |= runs[:, place].int() << 4 * place
    return words


@triton.jit
def _multiply(
    x,
    words,
    zeros,
    multipliers,
    steps,
    bias,
    y,
    parts,
    counters,
    rows,
    channels,
    width,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, 16)
    kind: tl.constexpr = x.dtype.element_ty
    exponent: tl.constexpr = 0x4300 if kind == tl.bfloat16 else 0x6400
    added: tl.constexpr = 128.0 if kind == tl.bfloat16 else 1024.0
    scaled: tl.constexpr = GROUP if GROUP < 128 else 128  # of K, by one multiplier
    blocks = width // 128
    from_row = x + m.to(tl.int64)[:, None] * width
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for block in range(
        blocks * tl.program_id(2) // SPLIT, blocks * (tl.program_id(2) + 1) // SPLIT
    ):
        at = words + (block * 16 + r[:, None]) * channels + n[None, :]
        word = tl.load(at, n[None, :] < channels, 0)
        for part in tl.static_range(128 // scaled):
            product = tl.zeros((ROWS, CHANNELS), tl.float32)
            group = (block * 128 + part * scaled) // GROUP * channels + n
            shift = tl.load(zeros + group, n < channels, 0).to(tl.float32) + added
            for run in tl.static_range(scaled // 16):
                place = part * (scaled // 16) + run
                k = block * 128 + place * 16 + r
                some = tl.load(from_row + k[None, :], m[:, None] < rows, 0.0)
                nibbles = ((word >> 4 * place) & 15) | exponent
                numbers = nibbles.to(tl.int16).to(kind, bitcast=True)
                product = portable.dot_less(some, numbers, shift, product)
            multiplier = tl.load(multipliers + group, n < channels, 0).to(tl.float32)
            total += product * multiplier[None, :]
    split_k.end(total, steps, bias, y, parts, counters, rows, channels, m, n, SPLIT, HAS_BIAS)


def int4_weight_only(
    x: torch.Tensor,
    words: torch.Tensor,
    zeros: torch.Tensor,
    multipliers: torch.Tensor,
    steps: torch.Tensor,
    counters: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return y [M, N] of x's dtype (bfloat16 or float16).

    Args:
        x: [M, K], contiguous.
        words, zeros, multipliers, steps: see the module.
        counters: `split_k.counters` of this weight.
        bias: float32 [N].
    """
    y = x.new_empty((x.shape[0], steps.shape[0]))
    weight = (words, zeros, multipliers, steps)
    group = x.shape[1] // zeros.shape[0]
    # Two sums for each product, one of them of a group: no registers for taller tiles.
    return split_k.launch(_multiply, x, weight, counters, bias, y, BLOCK, tallest=64, GROUP=group)
