"""LLVM code of tiles with 8-bit weights.

- AVX512: `vpdpbusd` adds four products of unsigned by signed bytes. So rows are moved up by 128,
  and 128 times a channel's sum is taken off the sums again.
- AVX2 has no such product that does not saturate. Weights become 16 bits on their way into a
  register, rows are kept as 16, and `vpmaddwd` adds two products, exactly.

Weights of a block: [units][channels][unit].
"""

from __future__ import annotations

from . import results, vectors
from .team import Tiling

WIDE = Tiling(lanes=16, rows=12, unit=4, together=48)
"""24 sums; the rest of 32 registers is for operands."""

NARROW = Tiling(lanes=8, rows=4, unit=2, together=24)
"""8 sums. With 6 rows, whose sums 16 registers would hold, it is a fifth slower."""

_ZERO = "zeroinitializer"


def tile(tiling: Tiling, rows: int) -> str:
    """Return the body of the function that multiplies so many rows by a block."""
    wide = tiling is WIDE
    vector, block = f"<{tiling.lanes} x i32>", tiling.channels * tiling.unit
    unroll = (4 if rows <= 2 else 2 if rows <= 4 else 1) if wide else 4
    # Few sums wait for themselves: then units have sums of their own, added at the end. (Not with
    # AVX2, where what is added to is ready after one cycle.)
    apart = unroll if wide else 1
    begun = step = end = ""
    totals: dict[tuple[int, int], str] = {}
    for unit in range(unroll):
        step += _weights(tiling, unit)
        for row in range(rows):
            step += vectors.load_one(
                f"a{unit}_{row}", "i32", "%a_at", (unit * rows + row) * 4, tiling.lanes
            )
            for half in (0, 1):
                name = f"{row}_{half}"
                before = f"%s{unit}_{name}" if unit < apart else f"%n{unit - apart}_{name}"
                step += (_dot if wide else _pairs)(f"n{unit}_{name}", before, unit, row, half)
    for row in range(rows):
        for half in (0, 1):
            name = f"{row}_{half}"
            for part in range(apart):
                last = f"%n{unroll - apart + part}_{name}"
                begun += f"  %s{part}_{name} = phi {vector} [ {_ZERO}, %entry ], [ {last}, %k ]\n"
                if part:
                    end += f"  %c{part}_{name} = add {vector} {totals[row, half]}, {last}\n"
                    last = f"%c{part}_{name}"
                totals[row, half] = last
    return f"""
entry:
  br label %k
k:
  %i = phi i64 [ 0, %entry ], [ %i_next, %k ]
{begun}
  %w_off = mul i64 %i, {block}
  %w_at = getelementptr i8, ptr %w, i64 %w_off
  %a_off = mul i64 %i, {rows * 4}
  %a_at = getelementptr i8, ptr %tile_rows, i64 %a_off
  %ahead_off = mul i64 %i, %ahead_step
  %ahead_at = getelementptr i8, ptr %tile_ahead, i64 %ahead_off
{step}
  %i_next = add i64 %i, {unroll}
  %more = icmp ult i64 %i_next, %units
  br i1 %more, label %k, label %end
end:
{end}
{results.code(rows, tiling.lanes, lambda *at: totals[at], "i32" if wide else None)}
"""


def _weights(tiling: Tiling, unit: int) -> str:
    """Return code for the vectors %w of a unit."""
    code, size = "", tiling.channels * tiling.unit // 2
    for half in (0, 1):
        name = f"w{unit}_{half}"
        offset = (2 * unit + half) * size
        if tiling is WIDE:
            code += vectors.load(name, "<16 x i32>", "%w_at", offset)
            code += vectors.prefetch(f"ahead{unit}_{half}", "%ahead_at", offset)
        else:
            code += vectors.load(f"{name}_few", "<16 x i8>", "%w_at", offset)
            code += f"  %{name} = sext <16 x i8> %{name}_few to <16 x i16>\n"
    if tiling is not WIDE and unit % 2 == 0:  # 64 bytes are two units
        code += vectors.prefetch(f"ahead{unit}", "%ahead_at", unit * size * 2)
    return code


def _dot(name: str, before: str, unit: int, row: int, half: int) -> str:
    return (
        f"  %{name} = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512("
        f"<16 x i32> {before}, <16 x i32> %a{unit}_{row}, <16 x i32> %w{unit}_{half})\n"
    )


def _pairs(name: str, before: str, unit: int, row: int, half: int) -> str:
    return f"""
  %{name}_a = bitcast <8 x i32> %a{unit}_{row} to <16 x i16>
  %{name}_p = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %{name}_a, \
<16 x i16> %w{unit}_{half})
  %{name} = add <8 x i32> {before}, %{name}_p
"""
