"""4-bit weights times many rows: unpacked to 8 bits in the cache, and multiplied from there.

With many rows arithmetic binds, and int8 dot products want int8 weights. Unpacking them to memory
for an int8 op costs half of what that saves, so 32 channels are unpacked at a time into scratch
that stays in the core's cache (K x 32 bytes), and every tile of rows is multiplied from there, as
in `tiles.py`. No op of torch or vLLM does that with groups, so this one is compiled here.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from . import native, team, tiles

_TENSORS = (
    "multipliers",  # int8 [blocks, groups, 32]
    "offsets",  # int8 [blocks, groups, 32]: -zero * multiplier, modulo 256
    "scratch",  # int8 [threads, K * 32]
)
_NUMBERS = ("parts", "part_quads", "parts_per_group")
"""The weight is uint8 [blocks, parts, part_quads * 64 + 128], see int4_linear.py."""

_TILING = dataclasses.replace(tiles.TILING, together=192)
"""More rows per block than with 8 bits, for a block is unpacked again for the next ones."""


@functools.cache
def available() -> bool:
    """Whether the kernel can be compiled for this processor and run on torch's threads."""
    return native.works(lambda: _compiled(torch.bfloat16))


@functools.cache
def _compiled(dtype: torch.dtype) -> native.Run:
    functions = tiles.functions(team.KINDS[dtype]) + _unpack()
    code = team.kernel(_TILING, _TENSORS, _NUMBERS, _BLOCK, functions)
    return native.compiled(code, tiles.NEEDS)


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    multipliers: torch.Tensor,
    offsets: torch.Tensor,
    sums: torch.Tensor,
    steps: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Return y [M, N] for x [M, K], bfloat16 or float16, and bias float32 [N].

    The other tensors are those of `team.TENSORS` and `_TENSORS`.
    """
    blocks, parts, size = weight.shape
    threads = min(torch.get_num_threads(), blocks)
    scratch = torch.empty((threads, x.shape[1] * tiles.CHANNELS), dtype=torch.int8)
    packed = team.Weight(
        weight,
        sums,
        steps,
        scratch.shape[1],
        (multipliers, offsets, scratch),
        (parts, (size - 128) // 64, parts // multipliers.shape[1]),
    )
    return team.multiply(_compiled(x.dtype), _TILING, x, packed, bias)


# ---- The code ---------------------------------------------------------------------------------

_ARGUMENTS = (
    "ptr %part_from, ptr %part_to, i64 %part_quads, ptr %group_multipliers, ptr %group_offsets"
)
_BLOCK = f"""
  %groups = udiv i64 %parts, %parts_per_group
  %part_bytes = mul i64 %part_quads, 64
  %part_in = add i64 %part_bytes, 128
  %part_out = mul i64 %part_quads, 128
  %block_in = mul i64 %part_in, %parts
  %w_off = mul i64 %number, %block_size
  %w = getelementptr i8, ptr %scratch, i64 %w_off
  %from_off = mul i64 %b, %block_in
  %block_from = getelementptr i8, ptr %weight, i64 %from_off
  %groups_before = mul i64 %b, %groups
  %ahead = getelementptr i8, ptr %block_from, i64 %block_in
  %ahead_bytes0 = udiv i64 %block_in, %units
  %ahead_bytes = add i64 %ahead_bytes0, 1
  %ahead_step = udiv i64 %ahead_bytes, %g_tiles
  br label %part
part:
  %p = phi i64 [ 0, %block ], [ %p_next, %part ]
  %group_in_block = udiv i64 %p, %parts_per_group
  %group_number = add i64 %groups_before, %group_in_block
  %group_at = mul i64 %group_number, 32
  %group_multipliers = getelementptr i8, ptr %multipliers, i64 %group_at
  %group_offsets = getelementptr i8, ptr %offsets, i64 %group_at
  %part_from_at = mul i64 %p, %part_in
  %part_from = getelementptr i8, ptr %block_from, i64 %part_from_at
  %part_to_at = mul i64 %p, %part_out
  %part_to = getelementptr i8, ptr %w, i64 %part_to_at
  call void @unpack({_ARGUMENTS})
  %p_next = add i64 %p, 1
  %more_parts = icmp ult i64 %p_next, %parts
  br i1 %more_parts, label %part, label %block_ready
block_ready:
"""


def _unpack() -> str:
    """Return the function that unpacks a part of a block, with its group's numbers."""
    lanes = ", ".join(f"i32 {lane // 4}" for lane in range(64))  # four bytes of K per channel
    joined = ", ".join(f"i32 {lane}" for lane in range(64))
    ones, shift = (f"<{', '.join([f'i8 {value}'] * 32)}>" for value in (15, 4))
    group, step = "", ""
    for half in (0, 1):
        for name in ("multipliers", "offsets"):
            group += f"""
  %{name}{half}at = getelementptr i8, ptr %group_{name}, i64 {half * 16}
  %{name}{half}few = load <16 x i8>, ptr %{name}{half}at, align 1
  %{name}{half} = shufflevector <16 x i8> %{name}{half}few, <16 x i8> poison, <64 x i32> <{lanes}>
"""
        step += f"""
  %in{half} = getelementptr i8, ptr %from, i64 {half * 32}
  %to{half} = getelementptr i8, ptr %to, i64 {half * 64}
  %bytes{half} = load <32 x i8>, ptr %in{half}, align 1
  %low{half} = and <32 x i8> %bytes{half}, {ones}
  %high{half} = lshr <32 x i8> %bytes{half}, {shift}
  %q{half} = shufflevector <32 x i8> %low{half}, <32 x i8> %high{half}, <64 x i32> <{joined}>
  %scaled{half} = mul <64 x i8> %q{half}, %multipliers{half}
  %whole{half} = add <64 x i8> %scaled{half}, %offsets{half}
  store <64 x i8> %whole{half}, ptr %to{half}, align 1
"""
    return f"""
define internal void @unpack({_ARGUMENTS}) {{
entry:
{group}
  br label %k
k:
  %i = phi i64 [ 0, %entry ], [ %i_next, %k ]
  %from_at = mul i64 %i, 64
  %from = getelementptr i8, ptr %part_from, i64 %from_at
  %to_at = mul i64 %i, 128
  %to = getelementptr i8, ptr %part_to, i64 %to_at
{step}
  %i_next = add i64 %i, 1
  %more = icmp ult i64 %i_next, %part_quads
  br i1 %more, label %k, label %done
done:
  ret void
}}
"""
