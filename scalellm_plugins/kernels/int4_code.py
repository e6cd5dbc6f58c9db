"""LLVM code of tiles with 4-bit weights: from nibbles to registers, at any number of rows.

The zero is taken off each nibble, which leaves signed bytes within ±15; rows are moved up by 128
(128 times a channel's sum is taken off again). Products are added as whole numbers within a group.

- AVX512: `vpdpbusd` adds four of them.
- AVX2: `vpmaddubsw` adds two, and so small are they that eight fit 16 bits; `vpmaddwd` adds these.

A group's sums are multiplied by what its channels have there: whole multipliers of one step per
channel ("exact": all sums are whole numbers, and the order of K does not matter), or a scale of 16
bits, then sums of groups are 32-bit floats.

A block: for each group the zeros, a byte each, and the multipliers, a byte each, or scales, filled
up to 64 bytes together; then for each group [K / 4][channels / 2][4] with channel c in the low
nibble and channel c + channels / 2 in the high one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from . import results, vectors
from .team import Tiling

_ZERO = "zeroinitializer"

WIDE = Tiling(lanes=16, rows=8, unit=4, together=48)
NARROW = Tiling(lanes=8, rows=4, unit=4, together=48)

NUMBERS = ("groups", "group_units")

_CHUNK = 4
"""Units whose products 16 bits hold: 4 times two of up to 255 · 15."""


def head(tiling: Tiling, exact: bool) -> int:
    """Return the bytes of a group's zeros and multipliers or scales."""
    return tiling.channels * (2 if exact else 3)


def tile(tiling: Tiling, kind: str, exact: bool, rows: int) -> str:
    """Return the body of the function that multiplies so many rows by a block."""
    wide, lanes = tiling is WIDE, tiling.lanes
    whole = f"<{lanes} x i32>"
    total = whole if exact else f"<{lanes} x float>"
    unroll = (4 if rows <= 2 else 2 if rows <= 4 else 1) if wide else _CHUNK
    # Few sums wait for themselves: then units have sums of their own, added at a group's end.
    apart = min(unroll, 4 if rows == 1 else 2) if wide else 1
    # With AVX2, multipliers come in for nothing where products of 16 bits are added up.
    through = exact and not wide
    totals = sums = end = ""
    step = "".join(_weights(tiling, unit) for unit in range(unroll))
    for row in range(rows):
        for unit in range(unroll):
            offset = (unit * rows + row) * 4
            step += vectors.load_one(f"a{unit}_{row}", "i32", "%a_at", offset, lanes)
        for half in (0, 1):
            name = f"{row}_{half}"
            step += _dots(name, unroll, apart) if wide else _pairs(name, exact)
            last = [f"%n{unroll - apart + part if wide else 0}_{name}" for part in range(apart)]
            start = f"%t_{name}" if through else _ZERO
            totals += f"  %t_{name} = phi {total} [ {_ZERO}, %entry ], [ %u_{name}, %next ]\n"
            for part in range(apart):
                sums += (
                    f"  %s{part}_{name} = phi {whole} [ {start}, %group ], [ {last[part]}, %k ]\n"
                )
            end += _add(name, lanes, last, "through" if through else "exact" if exact else "scale")
    size = tiling.channels * 2
    return f"""
entry:
  %heads_of = mul i64 %groups, {head(tiling, exact)}
  %heads_up = add i64 %heads_of, 63
  %heads = and i64 %heads_up, -64
  %first_w = getelementptr i8, ptr %w, i64 %heads
  br label %group
group:
  %j = phi i64 [ 0, %entry ], [ %j_next, %next ]
  %head = phi ptr [ %w, %entry ], [ %head_next, %next ]
  %group_w = phi ptr [ %first_w, %entry ], [ %w_next, %next ]
  %group_rows = phi ptr [ %tile_rows, %entry ], [ %a_next, %next ]
  %group_ahead = phi ptr [ %tile_ahead, %entry ], [ %ahead_next, %next ]
{totals}
{_head(tiling, kind, exact)}
  %j_next = add i64 %j, 1
  %head_next = getelementptr i8, ptr %head, i64 {head(tiling, exact)}
  br label %k
k:
  %i = phi i64 [ 0, %group ], [ %i_next, %k ]
  %w_at = phi ptr [ %group_w, %group ], [ %w_next, %k ]
  %a_at = phi ptr [ %group_rows, %group ], [ %a_next, %k ]
  %ahead_at = phi ptr [ %group_ahead, %group ], [ %ahead_next, %k ]
{sums}
{step}
  %i_next = add i64 %i, {unroll}
  %w_next = getelementptr i8, ptr %w_at, i64 {unroll * size}
  %a_next = getelementptr i8, ptr %a_at, i64 {unroll * rows * 4}
  %ahead_by = mul i64 %ahead_step, {unroll}
  %ahead_next = getelementptr i8, ptr %ahead_at, i64 %ahead_by
  %more = icmp ult i64 %i_next, %group_units
  br i1 %more, label %k, label %next
next:
{end}
  %more_groups = icmp ult i64 %j_next, %groups
  br i1 %more_groups, label %group, label %end
end:
{results.code(rows, lanes, lambda row, half: f"%u_{row}_{half}", "i32" if exact else "float")}
"""


def _add(
    name: str, lanes: int, sums: Sequence[str], how: Literal["through", "exact", "scale"]
) -> str:
    """Return code for the total %u after a group, of its sums and the total %t before it.

    "through": the sums began with that total, and were multiplied on their way.
    """
    half = name.split("_")[1]
    whole, floats = f"<{lanes} x i32>", f"<{lanes} x float>"
    code, found = "", sums[0]
    for part, other in enumerate(sums[1:]):
        code += f"  %c{part}_{name} = add {whole} {found}, {other}\n"
        found = f"%c{part}_{name}"
    if how == "through":
        return code + f"  %u_{name} = add {whole} {found}, {_ZERO}\n"
    if how == "exact":
        code += f"  %x_{name} = mul {whole} {found}, %m{half}\n"
        return code + f"  %u_{name} = add {whole} %t_{name}, %x_{name}\n"
    arguments = f"{floats} %x_{name}, {floats} %m{half}, {floats} %t_{name}"
    code += f"  %x_{name} = sitofp {whole} {found} to {floats}\n"
    return code + f"  %u_{name} = call {floats} @llvm.fma.v{lanes}f32({arguments})\n"


def _head(tiling: Tiling, kind: str, exact: bool) -> str:
    """Return code for a group's zeros, %z, as bytes, and what its sums are multiplied by, %m."""
    lanes, channels = tiling.lanes, tiling.channels
    code = vectors.load("zeros", f"<{channels} x i8>", "%head", 0)
    for half in (0, 1):
        each = vectors.numbers("i32", [half * lanes + byte // 4 for byte in range(4 * lanes)])
        code += (
            f"  %z{half} = shufflevector <{channels} x i8> %zeros, <{channels} x i8> poison, "
            f"<{4 * lanes} x i32> {each}\n"
        )
        if not exact:
            at = channels + half * lanes * 2
            code += vectors.load(f"m{half}_few", f"<{lanes} x i16>", "%head", at)
            code += vectors.widen(f"m{half}", f"%m{half}_few", kind, lanes)
            continue
        code += vectors.load(f"m{half}_few", f"<{lanes} x i8>", "%head", channels + half * lanes)
        if tiling is WIDE:
            code += f"  %m{half} = sext <16 x i8> %m{half}_few to <16 x i32>\n"
        else:
            twice = vectors.numbers("i32", [number // 2 for number in range(16)])
            code += f"""
  %m{half}_two = shufflevector <8 x i8> %m{half}_few, <8 x i8> poison, <16 x i32> {twice}
  %m{half} = sext <16 x i8> %m{half}_two to <16 x i16>
"""
    return code


def _weights(tiling: Tiling, unit: int) -> str:
    """Return code for the vectors %v of a unit: nibbles less their zeros."""
    count = 4 * tiling.lanes
    vector = f"<{count} x i8>"
    code = vectors.load(f"w{unit}", vector, "%w_at", unit * count)
    if unit % (64 // count) == 0:
        code += f"  %ahead{unit}_off = mul i64 %ahead_step, {unit}\n"
        code += vectors.prefetch(f"ahead{unit}", "%ahead_at", f"%ahead{unit}_off")
    return (
        code
        + f"""
  %low{unit} = and {vector} %w{unit}, {vectors.constant("i8", 15, count)}
  %high{unit} = lshr {vector} %w{unit}, {vectors.constant("i8", 4, count)}
  %v{unit}_0 = sub {vector} %low{unit}, %z0
  %v{unit}_1 = sub {vector} %high{unit}, %z1
"""
    )


def _dots(name: str, unroll: int, apart: int) -> str:
    """Return code that adds the products of some units, by AVX512."""
    row, half = name.split("_")
    code = ""
    for unit in range(unroll):
        before = f"%s{unit}_{name}" if unit < apart else f"%n{unit - apart}_{name}"
        code += f"""
  %d{unit}_{name} = bitcast <64 x i8> %v{unit}_{half} to <16 x i32>
  %n{unit}_{name} = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> {before}, \
<16 x i32> %a{unit}_{row}, <16 x i32> %d{unit}_{name})
"""
    return code


def _pairs(name: str, exact: bool) -> str:
    """Return code that adds the products of a chunk, by AVX2."""
    row, half = name.split("_")
    code, total = "", ""
    for unit in range(_CHUNK):
        code += f"""
  %b{unit}_{name} = bitcast <8 x i32> %a{unit}_{row} to <32 x i8>
  %p{unit}_{name} = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %b{unit}_{name}, \
<32 x i8> %v{unit}_{half})
"""
        if total:
            code += f"  %h{unit}_{name} = add <16 x i16> {total}, %p{unit}_{name}\n"
        total = f"%h{unit}_{name}" if total else f"%p{unit}_{name}"
    by = f"%m{half}" if exact else vectors.constant("i16", 1, 16)
    return f"""{code}
  %f_{name} = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> {total}, <16 x i16> {by})
  %n0_{name} = add <8 x i32> %s0_{name}, %f_{name}
"""
