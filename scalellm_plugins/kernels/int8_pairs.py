"""y = x · Wᵀ as in `int8_linear.py`, for processors without AVX512: pairs of 16 bits.

Compiled here. AVX2 has no product of signed bytes that does not saturate. So weights lie as bytes and become 16
bits on their way into a register, rows are rounded to 8 bits and kept as 16, and `vpmaddwd` adds
two products at a time, exactly.

Layout: blocks of 16 channels, [K / 2, 16, 2].

Rows that hold an infinity or NaN have no defined result; other rows are not affected by them.
"""

from __future__ import annotations

import functools

import torch

from . import narrow, native, team
from .narrow import CHANNELS
from .team import DEPTH

_TILING = team.Tiling(CHANNELS, rows=4, unit=2, together=24)
"""4 rows: 8 sums. With 6, which 16 registers would hold, it is a fifth slower."""

_UNROLL = 4


@functools.cache
def available() -> bool:
    """Whether the kernel can be compiled for this processor and run on torch's threads."""
    return native.works(lambda: _compiled(torch.bfloat16))


@functools.cache
def _compiled(dtype: torch.dtype) -> native.Run:
    kind = team.KINDS[dtype]
    tiles = "".join(_tile(rows) for rows in range(1, _TILING.rows + 1))
    functions = narrow.DECLARED + narrow.rounding(kind, 2) + narrow.stores(kind) + tiles
    return native.compiled(team.kernel(_TILING, (), (), _BLOCK, functions), narrow.NEEDS)


class Int8Pairs:
    """A packed weight. N and K are filled up with zeros to whole blocks and to `DEPTH`.

    Args:
        q: int8 [N, K], within ±127.
        scales: float32 [N].
    """

    def __init__(self, q: torch.Tensor, scales: torch.Tensor) -> None:
        self.out_features, width = q.shape
        deep = -(-width // DEPTH) * DEPTH
        blocks = -(-self.out_features // CHANNELS)
        weight = torch.zeros((blocks, deep // 2, CHANNELS, 2), dtype=torch.int8)
        # In so many words: while vLLM loads, the default dtype is the model's.
        steps = torch.zeros(blocks * CHANNELS, dtype=torch.float32)
        steps[: self.out_features] = scales
        for block, rows in enumerate(q.split(CHANNELS)):
            whole = torch.nn.functional.pad(rows, (0, deep - width))
            weight[block, :, : len(rows)] = whole.view(len(rows), -1, 2).transpose(0, 1)
        none = torch.zeros(self.out_features, dtype=torch.float32)
        self.tensors = (weight, steps, none)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y [M, N] for x [M, K], bfloat16 or float16, and bias float32 [N]."""
        call = torch.ops.scalellm.int8_pairs if torch.compiler.is_compiling() else int8_pairs
        weight, steps, zeros = self.tensors
        y: torch.Tensor = call(x, weight, steps, zeros if bias is None else bias)
        return y


def int8_pairs(
    x: torch.Tensor, weight: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Multiply by the weight that the tensors of an `Int8Pairs` are."""
    packed = team.Weight(weight, steps, steps, weight.stride(0))  # nothing is taken off sums
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
    sums, step = "", ""
    for unit in range(_UNROLL):
        for half in (0, 1):
            name = f"w{unit}_{half}"
            step += narrow.at(f"{name}_at", "%w_at", (unit * CHANNELS + half * 8) * 2)
            step += f"""
  %{name}_few = load <16 x i8>, ptr %{name}_at, align 1
  %{name} = sext <16 x i8> %{name}_few to <16 x i16>
"""
        for row in range(rows):
            name = f"a{unit}_{row}"
            step += narrow.at(f"{name}_at", "%a_at", (unit * rows + row) * 4)
            step += f"  %{name}_one = load i32, ptr %{name}_at, align 1\n"
            step += narrow.splat(f"{name}_all", "i32", f"%{name}_one", 8)
            step += f"  %{name} = bitcast <8 x i32> %{name}_all to <16 x i16>\n"
            for half in (0, 1):
                name = f"{row}_{half}"
                before = f"%s{unit - 1}_{name}" if unit else f"%s_{name}"
                step += (
                    f"  %p{unit}_{name} = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> "
                    f"%w{unit}_{half}, <16 x i16> %a{unit}_{row})\n"
                    f"  %s{unit}_{name} = add <8 x i32> {before}, %p{unit}_{name}\n"
                )
    last = _UNROLL - 1
    for row in range(rows):
        for half in (0, 1):
            name = f"{row}_{half}"
            start = "[ zeroinitializer, %entry ]"
            sums += f"  %s_{name} = phi <8 x i32> {start}, [ %s{last}_{name}, %k ]\n"
    return narrow.tile(
        rows,
        f"""
entry:
  br label %k
k:
  %i = phi i64 [ 0, %entry ], [ %i_next, %k ]
{sums}
  %w_off = mul i64 %i, {CHANNELS * 2}
  %w_at = getelementptr i8, ptr %w, i64 %w_off
  %a_off = mul i64 %i, {rows * 4}
  %a_at = getelementptr i8, ptr %tile_rows, i64 %a_off
  %ahead_off = mul i64 %i, %ahead_step
  %ahead_at = getelementptr i8, ptr %tile_ahead, i64 %ahead_off
  call void @llvm.prefetch.p0(ptr %ahead_at, i32 0, i32 2, i32 1)
{step}
  %i_next = add i64 %i, {_UNROLL}
  %more = icmp ult i64 %i_next, %units
  br i1 %more, label %k, label %end
end:
{narrow.finish(rows, lambda row, half: f"%s{last}_{row}_{half}", take_off=False)}
""",
    )


# torch.compile sees one opaque op. (`torch.library.custom_op` would cost each call 10 µs more.)
_library = torch.library.Library("scalellm", "FRAGMENT")
_library.define("int8_pairs(Tensor x, Tensor weight, Tensor steps, Tensor bias) -> Tensor")
_library.impl("int8_pairs", int8_pairs, "CPU")
torch.library.register_fake(
    "scalellm::int8_pairs",
    lambda x, *tensors: x.new_empty((x.shape[0], tensors[-1].shape[0])),
    lib=_library,
)
