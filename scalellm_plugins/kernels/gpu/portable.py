"""What Triton's interpreter (3.6) computes wrongly, by other means there, and only there.

It multiplies and converts the bits of bfloat16 as if they were integers, and loses the carry where
rounding to fp8 goes up to the next power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, total):
    """Return total + a · b for tiles of 16-bit floats; b may be int8."""
    if _INTERPRETED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        result = tl.dot(a, b.to(a.dtype), total)
    return result


@triton.jit
def dot_less(a, b, shift, total):
    """Return total + a · (b - shift) for tiles of 16-bit floats; shift float32 [N], exact in 16."""
    if _INTERPRETED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32) - shift[None, :], total)
    else:
        result = tl.dot(a, b - shift.to(b.dtype)[None, :], total)
    return result


@triton.jit
def to_fp8(values, KIND: tl.constexpr):
    """Return float32 values within ±448 in fp8 (e4m3), rounded to even."""
    if _INTERPRETED:
        bits = values.to(tl.int32, bitcast=True)
        half = 0x7FFFF + ((bits >> 20) & 1)  # of what is cut off below three bits
        values = ((bits + half) & -0x100000).to(tl.float32, bitcast=True)
    return values.to(KIND)
