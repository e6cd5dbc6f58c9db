"""LLVM code that rounds a row to 8 bits, in the order in which a tile of rows reads it."""

from __future__ import annotations

from . import vectors

_NARROW = {
    4: f"""
  %moved = add <8 x i32> %whole, {vectors.constant("i32", 128, 8)}
  %few = trunc <8 x i32> %moved to <8 x i8>
  %units = bitcast <8 x i8> %few to <2 x i32>
""",
    2: """
  %few = trunc <8 x i32> %whole to <8 x i16>
  %units = bitcast <8 x i16> %few to <4 x i32>
""",
}


def function(kind: str, unit: int) -> str:
    """Return the function `round`: it writes a unit every %stride bytes, and the row's step.

    It needs AVX2 and, for float16, F16C.

    Args:
        kind: LLVM's name of the row's type.
        unit: 4, of bytes moved up by 128, or 2, of 16 bits.
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
    return f"""
define internal void @round(ptr %x, i64 %width, ptr %to, i64 %stride, ptr %step_to) {{
{_REST}
sized:
  %padded_of = add i64 %width, 15
  %padded = and i64 %padded_of, -16
  br label %largest
{_LARGEST}
found:
  %top_bits = call i16 @llvm.vector.reduce.umax.v16i16(<16 x i16> %m_next)
{vectors.splat("tops", "i16", "%top_bits", 8)}
{vectors.widen("top_wide", "%tops", kind, 8)}
  %top = extractelement <8 x float> %top_wide, i64 0
  %step = fdiv float %top, 127.0
  store float %step, ptr %step_to
  %inverse_of = fdiv float 127.0, %top
  %zero = fcmp oeq float %top, 0.0
  %inverse = select i1 %zero, float 0.0, float %inverse_of
{vectors.splat("scale", "float", "%inverse", 8)}
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
{vectors.widen("wide", "%k_bits", kind, 8)}
  %scaled = fmul <8 x float> %wide, %scale
  %whole = call <8 x i32> @llvm.x86.avx.cvt.ps2dq.256(<8 x float> %scaled)
{_NARROW[unit]}
{stores}
  %o_off = mul i64 %stride, {count}
  %o_next = getelementptr i8, ptr %o, i64 %o_off
  %k_next = add i64 %k, 8
  %k_more = icmp ult i64 %k_next, %padded
  br i1 %k_more, label %convert, label %done
done:
  ret void
}}
"""


_REST = """
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
"""
"""The end of a row, where it is not a whole 16, with zeros after it: what is read stays inside."""

_LARGEST = f"""
largest:
  %i = phi i64 [ 0, %sized ], [ %i_next, %largest ]
  %m = phi <16 x i16> [ zeroinitializer, %sized ], [ %m_next, %largest ]
  %i_in = getelementptr i16, ptr %x, i64 %i
  %i_whole = icmp ult i64 %i, %whole_end
  %i_at = select i1 %i_whole, ptr %i_in, ptr %rest
  %bits = load <16 x i16>, ptr %i_at, align 1
  %sizes = and <16 x i16> %bits, {vectors.constant("i16", 32767, 16)}
  %bigger = icmp ugt <16 x i16> %sizes, %m
  %m_next = select <16 x i1> %bigger, <16 x i16> %sizes, <16 x i16> %m
  %i_next = add i64 %i, 16
  %i_more = icmp ult i64 %i_next, %width
  br i1 %i_more, label %largest, label %found
"""
"""The row's largest value: without their signs, numbers are in the order of their bits."""
