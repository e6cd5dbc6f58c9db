"""LLVM code for tiles of rows in vectors of 256 bits (AVX2), which 8-bit and 4-bit weights share.

A block has 16 channels: two vectors of 8 sums for each row of a tile.
"""

from __future__ import annotations

from collections.abc import Callable

from .team import ARGUMENTS

CHANNELS = 16
"""Channels of a block."""

NEEDS = ("avx2", "fma", "f16c")
"""Features of the processor."""

DECLARED = """
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)
declare <8 x i32> @llvm.x86.avx.cvt.ps2dq.256(<8 x float>)
declare <8 x float> @llvm.masked.load.v8f32.p0(ptr, i32, <8 x i1>, <8 x float>)
declare void @llvm.masked.store.v16i16.p0(<16 x i16>, ptr, i32, <16 x i1>)
declare i16 @llvm.vector.reduce.umax.v16i16(<16 x i16>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""


def at(name: str, base: str, offset: int | str) -> str:
    """Return code for the pointer %name, so many bytes after a base."""
    return f"  %{name} = getelementptr i8, ptr {base}, i64 {offset}\n"


def splat(name: str, kind: str, value: str, count: int) -> str:
    """Return code for the vector %name of one value."""
    vector = f"<{count} x {kind}>"
    return f"""
  %{name}_first = insertelement {vector} poison, {kind} {value}, i64 0
  %{name} = shufflevector {vector} %{name}_first, {vector} poison, <{count} x i32> zeroinitializer
"""


def constant(kind: str, value: object, count: int) -> str:
    """Return a vector of one constant."""
    return f"<{', '.join([f'{kind} {value}'] * count)}>"


def numbers(kind: str, values: list[int]) -> str:
    """Return a vector of constants."""
    return f"<{', '.join(f'{kind} {value}' for value in values)}>"


# ---- A row to 8 bits --------------------------------------------------------------------------


def rounding(kind: str, unit: int) -> str:
    """Return the function `round`: it writes a unit every %stride bytes, and the row's step.

    Args:
        kind: LLVM's name of the row's type.
        unit: 4, of bytes moved up by 128, or 2, of 16 bits.
    """
    if unit == 4:
        middle = constant("i32", 128, 8)
        narrow = f"""
  %moved = add <8 x i32> %whole, {middle}
  %few = trunc <8 x i32> %moved to <8 x i8>
  %units = bitcast <8 x i8> %few to <2 x i32>
"""
    else:
        narrow = """
  %few = trunc <8 x i32> %whole to <8 x i16>
  %units = bitcast <8 x i16> %few to <4 x i32>
"""
    count = 8 // unit
    stores = "".join(
        f"""
  %one{part} = extractelement <{count} x i32> %units, i64 {part}
  %off{part} = mul i64 %stride, {part}
  %at{part} = getelementptr i8, ptr %o, i64 %off{part}
  store i32 %one{part}, ptr %at{part}, align 1
"""
        for part in range(count)
    )
    # Without their signs, numbers are in the order of their bits; NaN comes last. The last 16 of
    # a row that are not whole are copied first, for 16 bits have no masked loads here.
    return f"""
define internal void @round(ptr %x, i64 %width, ptr %to, i64 %stride, ptr %step_to) {{
entry:
  %rest = alloca <16 x i16>
  store <16 x i16> zeroinitializer, ptr %rest
  %whole_end = and i64 %width, -16
  %some_rest = icmp ult i64 %whole_end, %width
  br i1 %some_rest, label %copy, label %sized
copy:
  %c = phi i64 [ %whole_end, %entry ], [ %c_next, %copy ]
  %c_from = getelementptr i16, ptr %x, i64 %c
  %c_inside = sub i64 %c, %whole_end
  %c_to = getelementptr i16, ptr %rest, i64 %c_inside
  %c_one = load i16, ptr %c_from, align 1
  store i16 %c_one, ptr %c_to, align 2
  %c_next = add i64 %c, 1
  %c_more = icmp ult i64 %c_next, %width
  br i1 %c_more, label %copy, label %sized
sized:
  br label %largest
largest:
  %i = phi i64 [ 0, %sized ], [ %i_next, %largest ]
  %m = phi <16 x i16> [ zeroinitializer, %sized ], [ %m_next, %largest ]
  %i_in = getelementptr i16, ptr %x, i64 %i
  %i_whole = icmp ult i64 %i, %whole_end
  %i_at = select i1 %i_whole, ptr %i_in, ptr %rest
  %bits = load <16 x i16>, ptr %i_at, align 1
  %sizes = and <16 x i16> %bits, {constant("i16", 32767, 16)}
  %bigger = icmp ugt <16 x i16> %sizes, %m
  %m_next = select <16 x i1> %bigger, <16 x i16> %sizes, <16 x i16> %m
  %i_next = add i64 %i, 16
  %i_more = icmp ult i64 %i_next, %width
  br i1 %i_more, label %largest, label %found
found:
  %top_bits = call i16 @llvm.vector.reduce.umax.v16i16(<16 x i16> %m_next)
{splat("tops", "i16", "%top_bits", 8)}
{_widen("top_wide", "tops", kind)}
  %top = extractelement <8 x float> %top_wide, i64 0
  %step = fdiv float %top, 127.0
  store float %step, ptr %step_to
  %inverse_of = fdiv float 127.0, %top
  %zero = fcmp oeq float %top, 0.0
  %inverse = select i1 %zero, float 0.0, float %inverse_of
{splat("scale", "float", "%inverse", 8)}
  br label %convert
convert:
  %k = phi i64 [ 0, %found ], [ %k_next, %convert ]
  %o = phi ptr [ %to, %found ], [ %o_next, %convert ]
  %k_in = getelementptr i16, ptr %x, i64 %k
  %k_after = sub i64 %k, %whole_end
  %k_rest = getelementptr i16, ptr %rest, i64 %k_after
  %k_whole = icmp ult i64 %k, %whole_end
  %k_at = select i1 %k_whole, ptr %k_in, ptr %k_rest
  %k_bits = load <8 x i16>, ptr %k_at, align 1
{_widen("wide", "k_bits", kind)}
  %scaled = fmul <8 x float> %wide, %scale
  %whole = call <8 x i32> @llvm.x86.avx.cvt.ps2dq.256(<8 x float> %scaled)
{narrow}
{stores}
  %o_off = mul i64 %stride, {count}
  %o_next = getelementptr i8, ptr %o, i64 %o_off
  %k_next = add i64 %k, 8
  %k_more = icmp ult i64 %k_next, %padded
  br i1 %k_more, label %convert, label %done
done:
  ret void
}}
""".replace(
        "sized:\n",
        "sized:\n  %padded_of = add i64 %width, 15\n  %padded = and i64 %padded_of, -16\n",
    )


def _widen(name: str, bits: str, kind: str) -> str:
    """Return code for 8 floats of the 16 bits of 8 numbers."""
    if kind == "half":
        return f"""
  %{name}_narrow = bitcast <8 x i16> %{bits} to <8 x half>
  %{name} = fpext <8 x half> %{name}_narrow to <8 x float>
"""
    return f"""
  %{name}_long = zext <8 x i16> %{bits} to <8 x i32>
  %{name}_high = shl <8 x i32> %{name}_long, {constant("i32", 16, 8)}
  %{name} = bitcast <8 x i32> %{name}_high to <8 x float>
"""


# ---- From sums to results ---------------------------------------------------------------------


def stores(kind: str) -> str:
    """Return the function `store16`: 16 floats as 16 bits, as many as are left of the channels."""
    narrow = "".join(_narrow(f"i{half}", f"f{half}", kind) for half in (0, 1))
    every = numbers("i32", list(range(16)))
    lanes = numbers("i64", list(range(16)))
    return f"""
define internal void @store16(<8 x float> %f0, <8 x float> %f1, ptr %to, i64 %left) {{
{narrow}
  %all = shufflevector <8 x i16> %i0, <8 x i16> %i1, <16 x i32> {every}
  %whole = icmp sge i64 %left, 16
  br i1 %whole, label %plain, label %masked
plain:
  store <16 x i16> %all, ptr %to, align 1
  ret void
masked:
{splat("lefts", "i64", "%left", 16)}
  %mask = icmp sgt <16 x i64> %lefts, {lanes}
  call void @llvm.masked.store.v16i16.p0(<16 x i16> %all, ptr %to, i32 1, <16 x i1> %mask)
  ret void
}}
"""


def _narrow(name: str, wide: str, kind: str) -> str:
    """Return code for the 16 bits of 8 floats, rounded to the nearest, to the even one of two."""
    if kind == "half":
        return f"""
  %{name}_narrow = fptrunc <8 x float> %{wide} to <8 x half>
  %{name} = bitcast <8 x half> %{name}_narrow to <8 x i16>
"""
    # What is not a number has no defined result, see the kernels: its bits may carry over.
    return f"""
  %{name}_bits = bitcast <8 x float> %{wide} to <8 x i32>
  %{name}_high = lshr <8 x i32> %{name}_bits, {constant("i32", 16, 8)}
  %{name}_odd = and <8 x i32> %{name}_high, {constant("i32", 1, 8)}
  %{name}_half = add <8 x i32> %{name}_odd, {constant("i32", 0x7FFF, 8)}
  %{name}_up = add <8 x i32> %{name}_bits, %{name}_half
  %{name}_top = lshr <8 x i32> %{name}_up, {constant("i32", 16, 8)}
  %{name} = trunc <8 x i32> %{name}_top to <8 x i16>
"""


def finish(rows: int, sums: Callable[[int, int], str], take_off: bool) -> str:
    """Return code from a tile's sums, <8 x i32> by (row, half), to its results.

    Args:
        take_off: the block's `sums` come off, see `TENSORS` of team.py.
    """
    code = ""
    lanes = numbers("i64", list(range(8)))
    for half in (0, 1):
        code += f"  %left{half} = sub i64 %left, {half * 8}\n"
        code += splat(f"lefts{half}", "i64", f"%left{half}", 8)
        code += f"  %mask{half} = icmp sgt <8 x i64> %lefts{half}, {lanes}\n"
        code += at(f"bias{half}_at", "%block_bias", half * 32)
        code += at(f"steps{half}_at", "%block_steps", half * 32)
        code += (
            f"  %bias{half} = call <8 x float> @llvm.masked.load.v8f32.p0(ptr %bias{half}_at, "
            f"i32 1, <8 x i1> %mask{half}, <8 x float> zeroinitializer)\n"
            f"  %steps{half} = load <8 x float>, ptr %steps{half}_at, align 1\n"
        )
        if take_off:
            code += at(f"sums{half}_at", "%block_sums", half * 32)
            code += f"  %sums{half} = load <8 x i32>, ptr %sums{half}_at, align 1\n"
    for row in range(rows):
        code += at(f"step{row}_at", "%tile_steps", row * 4)
        code += f"  %step{row}_one = load float, ptr %step{row}_at, align 1\n"
        code += splat(f"step{row}", "float", f"%step{row}_one", 8)
        code += f"  %y{row}_off = mul i64 %y_stride, {row}\n"
        code += at(f"y{row}", "%tile_y", f"%y{row}_off")
        for half in (0, 1):
            name, total = f"{row}_{half}", sums(row, half)
            if take_off:
                code += f"  %d{name} = sub <8 x i32> {total}, %sums{half}\n"
                total = f"%d{name}"
            code += f"""
  %f{name} = sitofp <8 x i32> {total} to <8 x float>
  %r{name} = fmul <8 x float> %f{name}, %step{row}
  %s{name} = fmul <8 x float> %r{name}, %steps{half}
  %z{name} = fadd <8 x float> %s{name}, %bias{half}
"""
        code += (
            f"  call void @store16(<8 x float> %z{row}_0, <8 x float> %z{row}_1, ptr %y{row}, "
            "i64 %left)\n"
        )
    return code


def tile(rows: int, body: str, more: str = "") -> str:
    """Return the function of a tile of so many rows."""
    return f"define internal void @tile{rows}({ARGUMENTS}{more}) {{\n{body}  ret void\n}}\n"
