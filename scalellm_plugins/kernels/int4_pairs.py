"""y = x · Wᵀ as in `int4_linear.py`, for processors without AVX512: straight from 4 bits.

Compiled here. A weight is (q - zero) · multiplier · step. `vpmaddubsw` multiplies rows, unsigned bytes,
by q - zero, which is within ±15, so that the sums of eight products fit 16 bits; `vpmaddwd`
multiplies these by the multipliers and adds two. So 4-bit weights take half the instructions of
8-bit ones and nothing is unpacked to memory, at any number of rows.

Rows are rounded to 8 bits and moved up by 128; 128 times a channel's sum is taken off again.

Layout: blocks of 16 channels; for each group of K the 16 zeros, the 16 multipliers, then
[K / 4, 8, 4] with channel c in the low nibble and channel c + 8 in the high one. So a block is one
stream of memory.

Rows that hold an infinity or NaN have no defined result; other rows are not affected by them.
"""

from __future__ import annotations

import functools

import torch

from . import narrow, native, team
from .narrow import CHANNELS

_TILING = team.Tiling(CHANNELS, rows=4, unit=4, together=48)

_CHUNK = 16
"""Of K: so much is multiplied before the sums of 16 bits would be too large."""

_HEAD = 2 * CHANNELS
"""Bytes of a group's zeros and multipliers."""

_NUMBERS = ("groups", "group_units")
_MORE = "".join(f", i64 %{name}" for name in _NUMBERS)


@functools.cache
def available() -> bool:
    """Whether the kernel can be compiled for this processor and run on torch's threads."""
    return native.works(lambda: _compiled(torch.bfloat16))


@functools.cache
def _compiled(dtype: torch.dtype) -> native.Run:
    kind = team.KINDS[dtype]
    tiles = "".join(_tile(rows) for rows in range(1, _TILING.rows + 1))
    functions = narrow.DECLARED + narrow.rounding(kind, 4) + narrow.stores(kind) + tiles
    return native.compiled(
        team.kernel(_TILING, (), _NUMBERS, _BLOCK, functions, _MORE), narrow.NEEDS
    )


class Int4Pairs:
    """A packed weight [N, K]. N is filled up to whole blocks; the group is a multiple of 32.

    Args:
        q: uint8 [N, K] in 0..15.
        zeros: int8 [N, K // group], in 0..15.
        multipliers: int8 [N, K // group].
        steps: float32 [N].
    """

    def __init__(
        self,
        q: torch.Tensor,
        zeros: torch.Tensor,
        multipliers: torch.Tensor,
        steps: torch.Tensor,
    ) -> None:
        self.out_features, width = q.shape
        groups = zeros.shape[1]
        group = width // groups
        blocks = -(-self.out_features // CHANNELS)
        weight = torch.zeros((blocks, groups, _HEAD + group * CHANNELS // 2), dtype=torch.uint8)
        # In so many words: while vLLM loads, the default dtype is the model's.
        sums = torch.zeros(blocks * CHANNELS, dtype=torch.int32)
        padded = torch.zeros(blocks * CHANNELS, dtype=torch.float32)
        padded[: self.out_features] = steps
        for block in range(blocks):
            rows = slice(block * CHANNELS, (block + 1) * CHANNELS)
            numbers = q[rows].view(-1, groups, group)
            heads = torch.stack([zeros[rows], multipliers[rows]])  # [2, channels, groups]
            each = (numbers.sum(2, dtype=torch.int32) - heads[0].int() * group) * heads[1].int()
            sums[rows][: len(each)] = 128 * each.sum(1)
            if missing := CHANNELS - len(numbers):
                numbers = torch.nn.functional.pad(numbers, (0, 0, 0, 0, 0, missing))
                heads = torch.nn.functional.pad(heads, (0, 0, 0, missing))
            weight[block, :, :_HEAD] = heads.permute(2, 0, 1).reshape(groups, -1).view(torch.uint8)
            low, high = numbers.view(2, 8, groups, group // 4, 4)
            nibbles = (low | (high << 4)).permute(1, 2, 0, 3)  # [groups, group / 4, 8, 4]
            weight[block, :, _HEAD:] = nibbles.reshape(groups, -1)
        none = torch.zeros(self.out_features, dtype=torch.float32)
        self.tensors = (weight, sums, padded, none)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y [M, N] for x [M, K], bfloat16 or float16, and bias float32 [N]."""
        call = torch.ops.scalellm.int4_pairs if torch.compiler.is_compiling() else int4_pairs
        weight, sums, steps, zeros = self.tensors
        y: torch.Tensor = call(x, weight, sums, steps, zeros if bias is None else bias)
        return y


def int4_pairs(
    x: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    steps: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Multiply by the weight that the tensors of an `Int4Pairs` are."""
    groups = weight.shape[1]
    numbers = (groups, x.shape[1] // groups // 4)
    packed = team.Weight(weight, sums, steps, weight.stride(0), (), numbers)
    return team.multiply(_compiled(x.dtype), _TILING, x.contiguous(), packed, bias.contiguous())


# ---- The code ---------------------------------------------------------------------------------

_BLOCK = """
  %w_off = mul i64 %b, %block_size
  %w = getelementptr i8, ptr %weight, i64 %w_off
  %ahead = getelementptr i8, ptr %w, i64 %block_size
  %ahead_step = udiv i64 32, %g_tiles
  br label %block_ready
block_ready:
"""


def _tile(rows: int) -> str:
    """Return the function that multiplies so many rows by a block."""
    units = _CHUNK // 4
    sums, outer, step = "", "", ""
    for half in (0, 1):
        # Each zero four times, as bytes; each multiplier twice, as 16 bits.
        zeros = narrow.numbers("i32", [half * 8 + lane // 4 for lane in range(32)])
        pairs = narrow.numbers("i32", [half * 8 + lane // 2 for lane in range(16)])
        outer += f"""
  %z{half} = shufflevector <16 x i8> %zeros, <16 x i8> poison, <32 x i32> {zeros}
  %m{half}_few = shufflevector <16 x i8> %multipliers, <16 x i8> poison, <16 x i32> {pairs}
  %m{half} = sext <16 x i8> %m{half}_few to <16 x i16>
"""
    for unit in range(units):
        step += narrow.at(f"w{unit}_at", "%w_at", unit * 32)
        step += f"""
  %w{unit} = load <32 x i8>, ptr %w{unit}_at, align 1
  %q{unit}_0 = and <32 x i8> %w{unit}, {narrow.constant("i8", 15, 32)}
  %q{unit}_1 = lshr <32 x i8> %w{unit}, {narrow.constant("i8", 4, 32)}
  %v{unit}_0 = sub <32 x i8> %q{unit}_0, %z0
  %v{unit}_1 = sub <32 x i8> %q{unit}_1, %z1
"""
    for row in range(rows):
        for unit in range(units):
            name = f"a{unit}_{row}"
            step += narrow.at(f"{name}_at", "%a_at", (unit * rows + row) * 4)
            step += f"  %{name}_one = load i32, ptr %{name}_at, align 1\n"
            step += narrow.splat(f"{name}_all", "i32", f"%{name}_one", 8)
            step += f"  %{name} = bitcast <8 x i32> %{name}_all to <32 x i8>\n"
        for half in (0, 1):
            name, total = f"{row}_{half}", ""
            start = "[ zeroinitializer, %entry ]"
            sums += f"  %g_{name} = phi <8 x i32> {start}, [ %n_{name}, %group_end ]\n"
            for unit in range(units):
                step += (
                    f"  %p{unit}_{name} = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> "
                    f"%a{unit}_{row}, <32 x i8> %v{unit}_{half})\n"
                )
                if total:
                    step += f"  %t{unit}_{name} = add <16 x i16> {total}, %p{unit}_{name}\n"
                total = f"%t{unit}_{name}" if total else f"%p{unit}_{name}"
            step += f"""
  %f_{name} = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> {total}, <16 x i16> %m{half})
  %n_{name} = add <8 x i32> %s_{name}, %f_{name}
"""
    inner = "".join(
        f"  %s_{row}_{half} = phi <8 x i32> [ %g_{row}_{half}, %group ], [ %n_{row}_{half}, %k ]\n"
        for row in range(rows)
        for half in (0, 1)
    )
    return narrow.tile(
        rows,
        f"""
entry:
  br label %group
group:
  %j = phi i64 [ 0, %entry ], [ %j_next, %group_end ]
  %group_at = phi ptr [ %w, %entry ], [ %w_next, %group_end ]
  %group_rows = phi ptr [ %tile_rows, %entry ], [ %a_next, %group_end ]
  %group_ahead = phi ptr [ %tile_ahead, %entry ], [ %ahead_next, %group_end ]
{sums}
  %zeros = load <16 x i8>, ptr %group_at, align 1
  %multipliers_at = getelementptr i8, ptr %group_at, i64 {CHANNELS}
  %multipliers = load <16 x i8>, ptr %multipliers_at, align 1
  %first_w = getelementptr i8, ptr %group_at, i64 {_HEAD}
{outer}
  %j_next = add i64 %j, 1
  br label %k
k:
  %i = phi i64 [ 0, %group ], [ %i_next, %k ]
  %w_at = phi ptr [ %first_w, %group ], [ %w_next, %k ]
  %a_at = phi ptr [ %group_rows, %group ], [ %a_next, %k ]
  %ahead_at = phi ptr [ %group_ahead, %group ], [ %ahead_next, %k ]
{inner}
  call void @llvm.prefetch.p0(ptr %ahead_at, i32 0, i32 2, i32 1)
{step}
  %i_next = add i64 %i, {units}
  %w_next = getelementptr i8, ptr %w_at, i64 {units * 32}
  %a_next = getelementptr i8, ptr %a_at, i64 {units * rows * 4}
  %ahead_by = mul i64 %ahead_step, {units}
  %ahead_next = getelementptr i8, ptr %ahead_at, i64 %ahead_by
  %more = icmp ult i64 %i_next, %group_units
  br i1 %more, label %k, label %group_end
group_end:
  %more_groups = icmp ult i64 %j_next, %groups
  br i1 %more_groups, label %group, label %end
end:
{narrow.finish(rows, lambda row, half: f"%n_{row}_{half}", take_off=True)}
""",
        _MORE,
    )


# torch.compile sees one opaque op. (`torch.library.custom_op` would cost each call 10 µs more.)
_library = torch.library.Library("scalellm", "FRAGMENT")
_library.define(
    "int4_pairs(Tensor x, Tensor weight, Tensor sums, Tensor steps, Tensor bias) -> Tensor"
)
_library.impl("int4_pairs", int4_pairs, "CPU")
torch.library.register_fake(
    "scalellm::int4_pairs",
    lambda x, *tensors: x.new_empty((x.shape[0], tensors[-1].shape[0])),
    lib=_library,
)
