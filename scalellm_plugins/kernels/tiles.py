"""LLVM code for tiles of rows in vectors of 512 bits, which 8-bit and 4-bit weights share.

A block has 32 channels; a tile keeps two vectors of sums a row. Rows are moved up by 128, for the
product of `vpdpbusd` is one of unsigned by signed bytes; 128 times a channel's sum is taken off the
sums again. A unit is 4 of K; weights of a block are [K / 4][32][4].
"""

from __future__ import annotations

from . import rounding, vectors
from .team import ARGUMENTS, Tiling

CHANNELS = 32
"""Channels of a block."""

MOST = 12
"""Rows of a tile: 24 sums; the rest of 32 registers is for operands."""

TILING = Tiling(CHANNELS, MOST, unit=4, together=48)

NEEDS = ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16")
"""Features of the processor."""


def functions(kind: str) -> str:
    """Return the functions of a kernel: `round`, and a `tile` for each number of rows."""
    tiles = "".join(_tile(kind, rows) for rows in range(1, MOST + 1))
    return vectors.DECLARED + rounding.function(kind) + tiles


def _tile(kind: str, rows: int) -> str:
    """Return the function that multiplies so many rows by a block."""
    # Few sums wait for themselves: then several 4 of K have sums of their own, added at the end.
    apart = 4 if rows <= 2 else 2 if rows <= 4 else 1
    sums, step, end = "", "", ""
    for quad in range(apart):
        for half in (0, 1):
            at = quad * CHANNELS * 4 + half * 64
            step += vectors.load(f"w{quad}_{half}", "i32", "%w_at", at)
            step += vectors.prefetch(f"ahead{quad}_{half}", "%ahead_at", at, 2)
        for row in range(rows):
            step += vectors.load_one(f"a{quad}_{row}", "i32", "%a_at", (quad * rows + row) * 4)
            for half in (0, 1):
                name = f"{quad}_{row}_{half}"
                sums += (
                    f"  %s{name} = phi <16 x i32> [ zeroinitializer, %entry ], [ %n{name}, %k ]\n"
                )
                step += (
                    f"  %n{name} = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> "
                    f"%s{name}, <16 x i32> %a{quad}_{row}, <16 x i32> %w{quad}_{half})\n"
                )
    for half in (0, 1):
        end += f"  %left{half} = sub i64 %left, {half * 16}\n"
        end += vectors.lanes(f"mask{half}", f"%left{half}")
        end += vectors.load(f"sums{half}", "i32", "%block_sums", half * 64)
        end += vectors.load(f"steps{half}", "float", "%block_steps", half * 64)
        end += vectors.load_masked(f"bias{half}", "float", "%block_bias", half * 64, f"%mask{half}")
    for row in range(rows):
        end += vectors.load_one(f"rs{row}", "float", "%tile_steps", row * 4)
        end += f"  %y_off{row} = mul i64 %y_stride, {row}\n"
        end += f"  %y{row} = getelementptr i8, ptr %tile_y, i64 %y_off{row}\n"
        for half in (0, 1):
            name, total = f"{row}_{half}", f"%n0_{row}_{half}"
            for quad in range(1, apart):
                end += f"  %c{quad}_{name} = add <16 x i32> {total}, %n{quad}_{name}\n"
                total = f"%c{quad}_{name}"
            end += f"""
  %d{name} = sub <16 x i32> {total}, %sums{half}
  %f{name} = sitofp <16 x i32> %d{name} to <16 x float>
  %r{name} = fmul <16 x float> %f{name}, %rs{row}
  %t{name} = fmul <16 x float> %r{name}, %steps{half}
  %u{name} = fadd <16 x float> %t{name}, %bias{half}
  %b{name} = fptrunc <16 x float> %u{name} to <16 x {kind}>
  %i{name} = bitcast <16 x {kind}> %b{name} to <16 x i16>
"""
            end += vectors.store_masked(f"i{name}", f"%y{row}", half * 32, f"%mask{half}")
    return f"""
define internal void @tile{rows}({ARGUMENTS}) {{
entry:
  br label %k
k:
  %i = phi i64 [ 0, %entry ], [ %i_next, %k ]
{sums}
  %w_off = mul i64 %i, {CHANNELS * 4}
  %w_at = getelementptr i8, ptr %w, i64 %w_off
  %a_off = mul i64 %i, {rows * 4}
  %a_at = getelementptr i8, ptr %tile_rows, i64 %a_off
  %ahead_off = mul i64 %i, %ahead_step
  %ahead_at = getelementptr i8, ptr %tile_ahead, i64 %ahead_off
{step}
  %i_next = add i64 %i, {apart}
  %more = icmp ult i64 %i_next, %units
  br i1 %more, label %k, label %end
end:
{end}
  ret void
}}
"""
