"""y = x · Wᵀ as in `int8_linear.py`, compiled here: `tiles.py` with the weights as they lie.

One pass from x to y, for any shape, bfloat16 and float16. In large layers it is faster than oneDNN
and than vLLM's packed op at every number of rows (measured: kernel_cost). With few rows it reads
weights about as fast as memory gives them; with many it comes to nine tenths of what the processor
can multiply.
Needs the processors of vLLM's AVX512-bf16 build; elsewhere the other two stand in.

Layout: blocks of 32 channels, [K / 4, 32, 4], so that a block is one stream of memory.

Rows that hold an infinity or NaN have no defined result; other rows are not affected by them.
"""

from __future__ import annotations

import functools

import torch

from . import native, team, tiles
from .team import DEPTH
from .tiles import CHANNELS

_AHEAD = 2048
"""Bytes that a single tile asks for in advance; with more of them, the next block is asked for."""

_BLOCK = f"""
  %w_off = mul i64 %b, %block_size
  %w = getelementptr i8, ptr %weight, i64 %w_off
  %single = icmp eq i64 %g_tiles, 1
  %ahead_off_w = select i1 %single, i64 {_AHEAD}, i64 %block_size
  %ahead = getelementptr i8, ptr %w, i64 %ahead_off_w
  %ahead_step = udiv i64 {CHANNELS * 4}, %g_tiles
  br label %block_ready
block_ready:
"""


@functools.cache
def available() -> bool:
    """Whether the kernel can be compiled for this processor and run on torch's threads."""
    return native.works(lambda: _compiled(torch.bfloat16))


@functools.cache
def _compiled(dtype: torch.dtype) -> native.Run:
    code = team.kernel(tiles.TILING, (), (), _BLOCK, tiles.functions(team.KINDS[dtype]))
    return native.compiled(code, tiles.NEEDS)


class Int8Tiles:
    """A packed weight. N and K are filled up with zeros to whole blocks and to `DEPTH`.

    Args:
        q: int8 [N, K], within ±127.
        scales: float32 [N].
    """

    def __init__(self, q: torch.Tensor, scales: torch.Tensor) -> None:
        self.out_features, width = q.shape
        deep = -(-width // DEPTH) * DEPTH
        blocks = -(-self.out_features // CHANNELS)
        weight = torch.zeros((blocks, deep // 4, CHANNELS, 4), dtype=torch.int8)
        sums = torch.zeros(blocks * CHANNELS, dtype=torch.int32)
        # In so many words: while vLLM loads, the default dtype is the model's.
        steps = torch.zeros(blocks * CHANNELS, dtype=torch.float32)
        sums[: self.out_features] = 128 * q.sum(1, dtype=torch.int32)
        steps[: self.out_features] = scales
        for block, rows in enumerate(q.split(CHANNELS)):
            whole = torch.nn.functional.pad(rows, (0, deep - width))
            weight[block, :, : len(rows)] = whole.view(len(rows), -1, 4).transpose(0, 1)
        none = torch.zeros(self.out_features, dtype=torch.float32)
        self.tensors = (weight, sums, steps, none)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y [M, N] for x [M, K], bfloat16 or float16, and bias float32 [N]."""
        call = torch.ops.scalellm.int8_tiles if torch.compiler.is_compiling() else int8_tiles
        weight, sums, steps, zeros = self.tensors
        y: torch.Tensor = call(x, weight, sums, steps, zeros if bias is None else bias)
        return y


def int8_tiles(
    x: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    steps: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Multiply by the weight that the tensors of an `Int8Tiles` are."""
    packed = team.Weight(weight, sums, steps, weight[0].numel())
    run = _compiled(x.dtype)
    return team.multiply(run, tiles.TILING, x.contiguous(), packed, bias.contiguous())


# torch.compile sees one opaque op. (`torch.library.custom_op` would cost each call 10 µs more.)
_library = torch.library.Library("scalellm", "FRAGMENT")
_library.define(
    "int8_tiles(Tensor x, Tensor weight, Tensor sums, Tensor steps, Tensor bias) -> Tensor"
)
_library.impl("int8_tiles", int8_tiles, "CPU")
torch.library.register_fake(
    "scalellm::int8_tiles",
    lambda x, *tensors: x.new_empty((x.shape[0], tensors[-1].shape[0])),
    lib=_library,
)
