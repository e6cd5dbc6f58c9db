"""y = x · Wᵀ with 4-bit weights in groups along K, and rows of x rounded to 8 bits (W4A8).

A weight is (q - zero) · scale: q and zero in 0..15, a scale per group and channel. Scales are
either whole multiples of one step per channel (two levels, as in QServe, arXiv 2405.04532), or
numbers of the rows' type, as in most checkpoints. Compiled here: `int4_code.py` multiplies straight
from 4 bits at any number of rows, in one pass from x to y, for any number of channels, bfloat16 and
float16. A row's result is the same whatever rows are beside it.

32 channels are a block with AVX512, 16 with AVX2; results are the same, bit for bit, with whole
multiples.

Rows that hold an infinity or NaN have no defined result; other rows are not affected by them.
"""

from __future__ import annotations

import functools

import torch

from . import int4_code, native, team
from .team import Tiling


@functools.cache
def best() -> Tiling | None:
    """Return the tiling for this processor; None where there is none, or no torch threads."""
    for tiling in (int4_code.WIDE, int4_code.NARROW):
        if native.works(functools.partial(_compiled, torch.bfloat16, tiling, True)):
            return tiling
    return None


@functools.cache
def _compiled(dtype: torch.dtype, tiling: Tiling, exact: bool) -> native.Run:
    kind = team.KINDS[dtype]
    tile = functools.partial(int4_code.tile, tiling, kind, exact)
    code = team.kernel(tiling, kind, int4_code.NUMBERS, tile)
    return native.compiled(code, tiling.needs)


class Int4Tiles:
    """A packed weight [N, K]. N is filled up to whole blocks; the group is a multiple of 32.

    Args:
        q: uint8 [N, K] in 0..15.
        zeros: int8 [N, K // group], in 0..15.
        scales: int8 [N, K // group], multiples of the steps; or of the type of x.
        steps: float32 [N]; None with scales that are no multiples.
        tiling: `best` or another.
    """

    def __init__(
        self,
        q: torch.Tensor,
        zeros: torch.Tensor,
        scales: torch.Tensor,
        steps: torch.Tensor | None,
        tiling: Tiling | None = None,
    ) -> None:
        tiling = tiling or best()
        assert tiling is not None, "no kernel for this processor"
        exact = scales.dtype == torch.int8
        assert exact == (steps is not None), "steps go with multiples of them"
        self.out_features, width = q.shape
        channels, groups = tiling.channels, zeros.shape[1]
        group, head = width // groups, int4_code.head(tiling, exact)
        blocks = -(-self.out_features // channels)
        heads = -(-groups * head // 64) * 64
        weight = torch.zeros((blocks, heads + channels * width // 2), dtype=torch.uint8)
        # In so many words: while vLLM loads, the default dtype is the model's.
        sums = torch.zeros(blocks * channels, dtype=torch.int32 if exact else torch.float32)
        all_steps = torch.ones(blocks * channels, dtype=torch.float32)
        if steps is not None:
            all_steps[: self.out_features] = steps
        for block in range(blocks):
            rows = slice(block * channels, (block + 1) * channels)
            numbers, zero, scale = q[rows].view(-1, groups, group), zeros[rows], scales[rows]
            each = numbers.sum(2, dtype=torch.int32) - zero.int() * group
            sums[rows][: len(each)] = 128 * (each * scale.to(sums.dtype)).sum(1)
            if missing := channels - len(numbers):
                numbers = torch.nn.functional.pad(numbers, (0, 0, 0, 0, 0, missing))
                zero, scale = (
                    torch.nn.functional.pad(part, (0, 0, 0, missing)) for part in (zero, scale)
                )
            parts = [part.t().contiguous().view(torch.uint8) for part in (zero, scale)]
            weight[block, : groups * head] = torch.cat(parts, dim=1).view(-1)
            low, high = numbers.view(2, channels // 2, groups, group // 4, 4)
            weight[block, heads:] = (low | (high << 4)).permute(1, 2, 0, 3).reshape(-1)
        none = torch.zeros(self.out_features, dtype=torch.float32)
        self.groups, self.tensors = groups, (weight, sums, all_steps, none)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y [M, N] for x [M, K], bfloat16 or float16, and bias float32 [N].

        With scales that are no multiples, x is of their type.
        """
        call = torch.ops.scalellm.int4_tiles if torch.compiler.is_compiling() else int4_tiles
        weight, sums, steps, zeros = self.tensors
        bias = zeros if bias is None else bias
        y: torch.Tensor = call(x, weight, sums, steps, bias, self.groups)
        return y


def int4_tiles(
    x: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    steps: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
) -> torch.Tensor:
    """Multiply by the weight that the tensors of an `Int4Tiles` are."""
    wide = steps.shape[0] // weight.shape[0] == int4_code.WIDE.channels
    tiling = int4_code.WIDE if wide else int4_code.NARROW
    numbers = (groups, x.shape[1] // groups // 4)
    packed = team.Weight(weight, sums, steps, weight.stride(0), numbers)
    run = _compiled(x.dtype, tiling, sums.dtype == torch.int32)
    return team.multiply(run, tiling, x.contiguous(), packed, bias.contiguous())


# torch.compile sees one opaque op. (`torch.library.custom_op` would cost each call 10 µs more.)
_library = torch.library.Library("scalellm", "FRAGMENT")
_library.define(
    "int4_tiles(Tensor x, Tensor weight, Tensor sums, Tensor steps, Tensor bias, int groups) "
    "-> Tensor"
)
_library.impl("int4_tiles", int4_tiles, "CPU")
torch.library.register_fake(
    "scalellm::int4_tiles",
    lambda x, *rest: x.new_empty((x.shape[0], rest[3].shape[0])),
    lib=_library,
)
