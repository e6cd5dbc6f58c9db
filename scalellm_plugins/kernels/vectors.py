"""LLVM code for vectors of 512 bits: what the kernels load, spread and store, and may call."""

from __future__ import annotations

DECLARED = """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)
declare <16 x i32> @llvm.x86.avx512.mask.cvtps2dq.512(<16 x float>, <16 x i32>, i16, i32)
declare <32 x i16> @llvm.masked.load.v32i16.p0(ptr, i32, <32 x i1>, <32 x i16>)
declare <16 x i16> @llvm.masked.load.v16i16.p0(ptr, i32, <16 x i1>, <16 x i16>)
declare <16 x float> @llvm.masked.load.v16f32.p0(ptr, i32, <16 x i1>, <16 x float>)
declare void @llvm.masked.store.v16i16.p0(<16 x i16>, ptr, i32, <16 x i1>)
declare i16 @llvm.vector.reduce.umax.v32i16(<32 x i16>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""


def splat(name: str, kind: str, value: str, count: int = 16) -> str:
    """Return code for the vector %name of one value."""
    vector = f"<{count} x {kind}>"
    return f"""
  %{name}_first = insertelement {vector} poison, {kind} {value}, i64 0
  %{name} = shufflevector {vector} %{name}_first, {vector} poison, <{count} x i32> zeroinitializer
"""


def lanes(name: str, bound: str, count: int = 16) -> str:
    """Return code for the mask %name: which of the lanes come before a bound, an i64."""
    numbers = ", ".join(f"i64 {lane}" for lane in range(count))
    return (
        splat(f"{name}_all", "i64", bound, count)
        + f"  %{name} = icmp sgt <{count} x i64> %{name}_all, <{numbers}>\n"
    )


def load(name: str, kind: str, base: str, offset: int) -> str:
    """Return code for a vector %name of 16, so many bytes after a base."""
    return _at(name, base, offset) + f"  %{name} = load <16 x {kind}>, ptr %{name}_at, align 1\n"


def load_masked(name: str, kind: str, base: str, offset: int, mask: str, count: int = 16) -> str:
    """Return code for a vector %name of which a mask says what is there; the rest is zero."""
    vector, short = f"<{count} x {kind}>", "f32" if kind == "float" else kind
    arguments = f"ptr %{name}_at, i32 1, <{count} x i1> {mask}, {vector} zeroinitializer"
    return (
        _at(name, base, offset)
        + f"  %{name} = call {vector} @llvm.masked.load.v{count}{short}.p0({arguments})\n"
    )


def store_masked(name: str, base: str, offset: int, mask: str) -> str:
    """Return code that stores the lanes of %name, 16 of 16 bits, that a mask names."""
    arguments = f"<16 x i16> %{name}, ptr %{name}_at, i32 1, <16 x i1> {mask}"
    return _at(name, base, offset) + f"  call void @llvm.masked.store.v16i16.p0({arguments})\n"


def load_one(name: str, kind: str, base: str, offset: int) -> str:
    """Return code for a vector %name of 16 times the number so many bytes after a base."""
    return (
        _at(name, base, offset)
        + f"  %{name}_one = load {kind}, ptr %{name}_at, align 1\n"
        + splat(name, kind, f"%{name}_one")
    )


def prefetch(name: str, base: str, offset: int, cache: int) -> str:
    """Return code that asks a cache, 3 the first and 2 the second, for what lies there."""
    return (
        _at(name, base, offset)
        + f"  call void @llvm.prefetch.p0(ptr %{name}_at, i32 0, i32 {cache}, i32 1)\n"
    )


def _at(name: str, base: str, offset: int) -> str:
    return f"  %{name}_at = getelementptr i8, ptr {base}, i64 {offset}\n"
