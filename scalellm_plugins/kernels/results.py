"""LLVM code from a tile's sums to its results: steps, bias, 16 bits, as many channels as there are.

A block's channels are two vectors: "halves", of 16 numbers or of 8.
"""

from __future__ import annotations

from collections.abc import Callable

from . import vectors


def code(rows: int, lanes: int, total: Callable[[int, int], str], sums: str | None) -> str:
    """Return the end of a tile's function, see `ARGUMENTS` of team.py. It calls `store`.

    Args:
        rows: of the tile.
        lanes: numbers of a vector.
        total: the name of a row's sum in a half: of sums' type, else of i32.
        sums: the type of what is taken off them, "i32" or "float"; None: nothing is.
    """
    vector = f"<{lanes} x float>"
    whole = f"<{lanes} x i32>"
    made = ""
    for half in (0, 1):
        offset = half * lanes * 4
        made += f"  %left{half} = sub i64 %left, {half * lanes}\n"
        made += vectors.lanes(f"mask{half}", f"%left{half}", lanes)
        made += vectors.load_floats(f"bias{half}", "%block_bias", offset, f"%mask{half}", lanes)
        made += vectors.load(f"steps{half}", vector, "%block_steps", offset)
        if sums:
            made += vectors.load(f"sums{half}", f"<{lanes} x {sums}>", "%block_sums", offset)
    for row in range(rows):
        made += vectors.load_one(f"step{row}", "float", "%tile_steps", row * 4, lanes)
        made += f"  %y{row}_off = mul i64 %y_stride, {row}\n"
        made += vectors.at(f"y{row}", "%tile_y", f"%y{row}_off")
        for half in (0, 1):
            name, found = f"{row}_{half}", total(row, half)
            if sums == "i32":
                made += f"  %d{name} = sub {whole} {found}, %sums{half}\n"
                found = f"%d{name}"
            if sums == "float":
                made += f"  %f{name} = fsub {vector} {found}, %sums{half}\n"
            else:
                made += f"  %f{name} = sitofp {whole} {found} to {vector}\n"
            made += f"""
  %r{name} = fmul {vector} %f{name}, %step{row}
  %s{name} = fmul {vector} %r{name}, %steps{half}
  %z{name} = fadd {vector} %s{name}, %bias{half}
"""
        arguments = f"{vector} %z{row}_0, {vector} %z{row}_1, ptr %y{row}, i64 %left"
        made += f"  call void @store({arguments})\n"
    return made


def function(kind: str, lanes: int) -> str:
    """Return the function `store`: two vectors of floats as 16 bits, the channels that are left."""
    vector = f"<{lanes} x float>"
    halves = "".join(vectors.narrow(f"i{half}", f"%f{half}", kind, lanes) for half in (0, 1))
    return f"""
define internal void @store({vector} %f0, {vector} %f1, ptr %to, i64 %left) {{
{halves}
{_WIDE if lanes == 16 else _NARROW}
  ret void
}}
"""


def _masked(name: str, base: str, offset: int, mask: str) -> str:
    arguments = f"<16 x i16> {name}, ptr %masked{offset}_at, i32 1, <16 x i1> {mask}"
    store = f"  call void @llvm.masked.store.v16i16.p0({arguments})\n"
    return vectors.at(f"masked{offset}_at", base, offset) + store


_WIDE = (
    "  %left1 = sub i64 %left, 16\n"
    + vectors.lanes("mask0", "%left", 16)
    + vectors.lanes("mask1", "%left1", 16)
    + _masked("%i0", "%to", 0, "%mask0")
    + _masked("%i1", "%to", 32, "%mask1")
)
# AVX2 has no masks for 16 bits: what stands for one is slow, and used in the last block only.
_NARROW = f"""
  %all = shufflevector <8 x i16> %i0, <8 x i16> %i1, <16 x i32> {vectors.numbers("i32", range(16))}
  %whole = icmp sge i64 %left, 16
  br i1 %whole, label %plain, label %some
plain:
  store <16 x i16> %all, ptr %to, align 1
  ret void
some:
{vectors.lanes("mask", "%left", 16)}
{_masked("%all", "%to", 0, "%mask")}
"""
