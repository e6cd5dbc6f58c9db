"""y = x · Wᵀ with 8-bit weights and rows of x rounded to 8 bits as they come (W8A8), compiled here.

One pass from x to y, for any shape, bfloat16 and float16; see `int8_linear.py` for what is
computed. In large layers it is faster than oneDNN and than vLLM's packed op at every number of rows
(measured: kernel_cost). With few rows it reads weights about as fast as memory gives them; with
many it comes to nine tenths of what the processor can multiply.

Layout: blocks of channels, [K / unit, channels, unit], so that a block is one stream of memory;
32 channels and units of 4 with AVX512, 16 and 2 with AVX2. Results are the same, bit for bit.

Rows that hold an infinity or NaN have no defined result; other rows are not affected by them.
"""

from __future__ import annotations

import functools

import torch

from . import int8_code, native, team
from .team import DEPTH, Tiling


@functools.cache
def best() -> Tiling | None:
    """Return the tiling for this processor; None where there is none, or no torch threads."""
    for tiling in (int8_code.WIDE, int8_code.NARROW):
        if native.works(functools.partial(_compiled, torch.bfloat16, tiling)):
            return tiling
    return None


@functools.cache
def _compiled(dtype: torch.dtype, tiling: Tiling) -> native.Run:
    tile = functools.partial(int8_code.tile, tiling)
    code = team.kernel(tiling, team.KINDS[dtype], (), tile)
    return native.compiled(code, tiling.needs)


class Int8Tiles:
    """A packed weight. N and K are filled up with zeros to whole blocks and to `DEPTH`.

    Args:
        q: int8 [N, K], within ±127.
        scales: float32 [N].
        tiling: `best` or another.
    """

    def __init__(self, q: torch.Tensor, scales: torch.Tensor, tiling: Tiling | None = None) -> None:
        tiling = tiling or best()
        assert tiling is not None, "no kernel for this processor"
        self.out_features, width = q.shape
        deep = -(-width // DEPTH) * DEPTH
        channels, unit = tiling.channels, tiling.unit
        blocks = -(-self.out_features // channels)
        weight = torch.zeros((blocks, deep // unit, channels, unit), dtype=torch.int8)
        sums = torch.zeros(blocks * channels, dtype=torch.int32)
        # In so many words: while vLLM loads, the default dtype is the model's.
        steps = torch.zeros(blocks * channels, dtype=torch.float32)
        sums[: self.out_features] = 128 * q.sum(1, dtype=torch.int32)
        steps[: self.out_features] = scales
        for block, rows in enumerate(q.split(channels)):
            whole = torch.nn.functional.pad(rows, (0, deep - width))
            weight[block, :, : len(rows)] = whole.view(len(rows), -1, unit).transpose(0, 1)
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
    wide = weight.shape[2] == int8_code.WIDE.channels
    tiling = int8_code.WIDE if wide else int8_code.NARROW
    packed = team.Weight(weight, sums, steps, weight.stride(0))
    run = _compiled(x.dtype, tiling)
    return team.multiply(run, tiling, x.contiguous(), packed, bias.contiguous())


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
