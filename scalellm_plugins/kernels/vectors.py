"""LLVM code for vectors, in pieces: what the kernels load, spread, mask, widen and narrow."""

from __future__ import annotations

from collections.abc import Sequence

DECLARED = """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)
declare <8 x i32> @llvm.x86.avx.cvt.ps2dq.256(<8 x float>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
declare <16 x float> @llvm.masked.load.v16f32.p0(ptr, i32, <16 x i1>, <16 x float>)
declare <8 x float> @llvm.masked.load.v8f32.p0(ptr, i32, <8 x i1>, <8 x float>)
declare void @llvm.masked.store.v16i16.p0(<16 x i16>, ptr, i32, <16 x i1>)
declare i16 @llvm.vector.reduce.umax.v16i16(<16 x i16>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""


def at(name: str, base: str, offset: int | str) -> str:
    """Return code for the pointer %name, so many bytes after a base."""
    return f"  %{name} = getelementptr i8, ptr {base}, i64 {offset}\n"


def load(name: str, vector: str, base: str, offset: int | str) -> str:
    """Return code for a vector %name of a type, so many bytes after a base."""
    return at(f"{name}_at", base, offset) + f"  %{name} = load {vector}, ptr %{name}_at, align 1\n"


def load_one(name: str, kind: str, base: str, offset: int, count: int) -> str:
    """Return code for a vector %name of so many times the number that lies there."""
    return (
        at(f"{name}_at", base, offset)
        + f"  %{name}_one = load {kind}, ptr %{name}_at, align 1\n"
        + splat(name, kind, f"%{name}_one", count)
    )


def load_floats(name: str, base: str, offset: int, mask: str, count: int) -> str:
    """Return code for a vector %name of which a mask says what is there; the rest is zero."""
    vector = f"<{count} x float>"
    arguments = f"ptr %{name}_at, i32 1, <{count} x i1> {mask}, {vector} zeroinitializer"
    return (
        at(f"{name}_at", base, offset)
        + f"  %{name} = call {vector} @llvm.masked.load.v{count}f32.p0({arguments})\n"
    )


def splat(name: str, kind: str, value: str, count: int) -> str:
    """Return code for the vector %name of one value."""
    vector = f"<{count} x {kind}>"
    return f"""
  %{name}_first = insertelement {vector} poison, {kind} {value}, i64 0
  %{name} = shufflevector {vector} %{name}_first, {vector} poison, <{count} x i32> zeroinitializer
"""


def numbers(kind: str, values: Sequence[int]) -> str:
    """Return a vector of constants."""
    return f"<{', '.join(f'{kind} {value}' for value in values)}>"


def constant(kind: str, value: int, count: int) -> str:
    """Return a vector of one constant."""
    return numbers(kind, [value] * count)


def lanes(name: str, bound: str, count: int) -> str:
    """Return code for the mask %name: which of the lanes come before a bound, an i64."""
    return (
        splat(f"{name}_all", "i64", bound, count)
        + f"  %{name} = icmp sgt <{count} x i64> %{name}_all, {numbers('i64', range(count))}\n"
    )


def prefetch(name: str, base: str, offset: int | str) -> str:
    """Return code that asks the second cache for what lies there."""
    return (
        at(f"{name}_at", base, offset)
        + f"  call void @llvm.prefetch.p0(ptr %{name}_at, i32 0, i32 2, i32 1)\n"
    )


def widen(name: str, bits: str, kind: str, count: int) -> str:
    """Return code for the floats %name of the 16 bits of numbers of a kind."""
    if kind == "half":
        return f"""
  %{name}_narrow = bitcast <{count} x i16> {bits} to <{count} x half>
  %{name} = fpext <{count} x half> %{name}_narrow to <{count} x float>
"""
    return f"""
  %{name}_long = zext <{count} x i16> {bits} to <{count} x i32>
  %{name}_high = shl <{count} x i32> %{name}_long, {constant("i32", 16, count)}
  %{name} = bitcast <{count} x i32> %{name}_high to <{count} x float>
"""


def narrow(name: str, wide: str, kind: str, count: int) -> str:
    """Return code for the 16 bits %name of floats, rounded to the nearest, to the even of two."""
    if kind == "half":
        return f"""
  %{name}_narrow = fptrunc <{count} x float> {wide} to <{count} x half>
  %{name} = bitcast <{count} x half> %{name}_narrow to <{count} x i16>
"""
    # Few processors with AVX512 have an instruction for bfloat16, and it is not what takes time.
    # What is not a number has no defined result, see the kernels: its bits may carry over.
    return f"""
  %{name}_bits = bitcast <{count} x float> {wide} to <{count} x i32>
  %{name}_high = lshr <{count} x i32> %{name}_bits, {constant("i32", 16, count)}
  %{name}_odd = and <{count} x i32> %{name}_high, {constant("i32", 1, count)}
  %{name}_half = add <{count} x i32> %{name}_odd, {constant("i32", 0x7FFF, count)}
  %{name}_up = add <{count} x i32> %{name}_bits, %{name}_half
  %{name}_top = lshr <{count} x i32> %{name}_up, {constant("i32", 16, count)}
  %{name} = trunc <{count} x i32> %{name}_top to <{count} x i16>
"""
