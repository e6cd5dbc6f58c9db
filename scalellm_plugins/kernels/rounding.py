"""LLVM code that rounds a row to 8 bits, in the order in which a tile of rows reads it."""

from __future__ import annotations

from . import vectors


def function(kind: str) -> str:
    """Return the function `round`: it writes 4 of K every %stride bytes, and the row's step."""
    same = f"<{', '.join(['i16 32767'] * 32)}>"
    middle = f"<{', '.join(['i32 128'] * 16)}>"
    stores = "".join(
        f"""
  %four{part} = extractelement <4 x i32> %fours, i64 {part}
  %off{part} = mul i64 %stride, {part}
  %at{part} = getelementptr i8, ptr %o, i64 %off{part}
  store i32 %four{part}, ptr %at{part}, align 1
"""
        for part in range(4)
    )
    arguments = "<16 x float> %scaled, <16 x i32> zeroinitializer, i16 -1, i32 4"
    # Without their signs, numbers are in the order of their bits; NaN comes last.
    return f"""
define internal void @round(ptr %x, i64 %width, ptr %to, i64 %stride, ptr %step_to) {{
entry:
  br label %largest
largest:
  %i = phi i64 [ 0, %entry ], [ %i_next, %largest ]
  %m = phi <32 x i16> [ zeroinitializer, %entry ], [ %m_next, %largest ]
  %i_left = sub i64 %width, %i
  %i_at = getelementptr i16, ptr %x, i64 %i
{vectors.lanes("i_mask", "%i_left", 32)}
{vectors.load_masked("bits", "i16", "%i_at", 0, "%i_mask", 32)}
  %sizes = and <32 x i16> %bits, {same}
  %bigger = icmp ugt <32 x i16> %sizes, %m
  %m_next = select <32 x i1> %bigger, <32 x i16> %sizes, <32 x i16> %m
  %i_next = add i64 %i, 32
  %i_more = icmp ult i64 %i_next, %width
  br i1 %i_more, label %largest, label %found
found:
  %top_bits = call i16 @llvm.vector.reduce.umax.v32i16(<32 x i16> %m_next)
  %top_narrow = bitcast i16 %top_bits to {kind}
  %top = fpext {kind} %top_narrow to float
  %step = fdiv float %top, 127.0
  store float %step, ptr %step_to
  %inverse_of = fdiv float 127.0, %top
  %zero = fcmp oeq float %top, 0.0
  %inverse = select i1 %zero, float 0.0, float %inverse_of
{vectors.splat("scale", "float", "%inverse")}
  br label %convert
convert:
  %k = phi i64 [ 0, %found ], [ %k_next, %convert ]
  %o = phi ptr [ %to, %found ], [ %o_next, %convert ]
  %k_left = sub i64 %width, %k
  %k_at = getelementptr i16, ptr %x, i64 %k
{vectors.lanes("k_mask", "%k_left")}
{vectors.load_masked("k_bits", "i16", "%k_at", 0, "%k_mask")}
  %narrow = bitcast <16 x i16> %k_bits to <16 x {kind}>
  %wide = fpext <16 x {kind}> %narrow to <16 x float>
  %scaled = fmul <16 x float> %wide, %scale
  %whole = call <16 x i32> @llvm.x86.avx512.mask.cvtps2dq.512({arguments})
  %moved = add <16 x i32> %whole, {middle}
  %few = trunc <16 x i32> %moved to <16 x i8>
  %fours = bitcast <16 x i8> %few to <4 x i32>
{stores}
  %o_off = mul i64 %stride, 4
  %o_next = getelementptr i8, ptr %o, i64 %o_off
  %k_next = add i64 %k, 16
  %k_more = icmp ult i64 %k_next, %width
  br i1 %k_more, label %convert, label %done
done:
  ret void
}}
"""
