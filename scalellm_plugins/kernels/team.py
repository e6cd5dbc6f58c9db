"""What the kernels that are compiled here share: threads, blocks of channels, tiles of rows.

A kernel works on blocks of channels, each thread on its share of them, and multiplies a block by
all rows, a tile of them at a time, whose sums stay in registers. First the threads round the rows,
each its share: by the row's largest value, to ±127. `int8_code.py` and `int4_code.py` have the code
of a tile, for vectors of 512 bits and for 256.

Rounded rows lie as a tile reads them: [tile][unit][row of the tile], a unit being 4 bytes. Tiles
differ by one row at most, so that none is filled up with rows that nobody needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import native, results, rounding, vectors

DEPTH = 16
"""K is filled up with zeros to a multiple of it."""

TENSORS = (
    "x",  # bfloat16 or float16 [M, K]
    "all_rows",  # uint8 [M, units * 4]: scratch for the rounded rows
    "all_row_steps",  # float32 [M]: scratch
    "y",  # [M, N], as x
    "weight",
    "sums",  # int32 [blocks * channels]: what is taken off a channel's sum
    "steps",  # float32 [blocks * channels]
    "bias",  # float32 [N]
)
NUMBERS = (
    "count",  # M
    "width",  # K
    "channels",  # N
    "units",  # of a row
    "blocks",
    "block_size",  # in bytes
    "tiles",  # of rows
    "together",  # tiles before the next block
    "own",  # bytes of a thread's own scratch; 0: they share it
)

_ALONE = 2
"""Rows that every thread rounds for itself: that takes less time than to wait for each other."""

AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512vnni")
AVX2 = ("avx2", "fma", "f16c")
"""Features of the processor that vectors of 16 numbers need, and those of 8."""

_AHEAD = 32768
"""Bytes that a single tile asks for in advance; of several, each asks for its part of the next
block. (Measured with 4 bits at 8 rows, times bf16: 2 KiB 2.9, 16 KiB 3.6, 32 KiB 3.6, 64 KiB 3.5.)
"""

KINDS = {torch.bfloat16: "bfloat", torch.float16: "half"}
"""Types of x and y, and LLVM's names for them."""


_SHARE = 1 << 17
"""Bytes of a weight, times rows, that are worth one more thread: waking it takes some µs."""


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work.

    Attributes:
        lanes: numbers of 32 bits in a vector; a block has two vectors of channels.
        rows: of a tile, at the most.
        unit: how many of K are 4 bytes of a rounded row.
        together: rows that are multiplied by a block before the next one, about: they stay in L2.
    """

    lanes: int
    rows: int
    unit: int
    together: int

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return 2 * self.lanes

    @property
    def needs(self) -> tuple[str, ...]:
        """Features of the processor."""
        return AVX512 if self.lanes == 16 else AVX2


class Weight(NamedTuple):
    """A packed weight: `TENSORS` from "weight" to "steps".

    Attributes:
        block_size: bytes of a block.
        numbers: more arguments of the tiles.
    """

    weight: torch.Tensor
    sums: torch.Tensor
    steps: torch.Tensor
    block_size: int
    numbers: Sequence[int] = ()


def multiply(
    run: native.Run, tiling: Tiling, x: torch.Tensor, weight: Weight, bias: torch.Tensor
) -> torch.Tensor:
    """Return y [M, N] for x [M, K], contiguous and of the kernel's type, and bias float32 [N]."""
    count, width = x.shape
    channels, blocks = bias.shape[0], weight.steps.shape[0] // tiling.channels
    units = -(-width // DEPTH) * DEPTH // tiling.unit
    y = torch.empty((count, channels), dtype=x.dtype)
    threads = min(torch.get_num_threads(), blocks, 1 + count * blocks * weight.block_size // _SHARE)
    size = count * (units + 1) * 4
    own = -(-size // 64) * 64 if count <= _ALONE else 0
    scratch = torch.empty(own * threads or size, dtype=torch.uint8)  # one call instead of two
    rows = scratch.data_ptr()
    arguments = (
        *(x.data_ptr(), rows, rows + count * units * 4, y.data_ptr()),
        *(weight.weight.data_ptr(), weight.sums.data_ptr(), weight.steps.data_ptr()),
        *(bias.data_ptr(), count, width, channels, units, blocks, weight.block_size),
        *(-(-count // tiling.rows), max(1, tiling.together // tiling.rows), own, *weight.numbers),
    )
    run(arguments, threads)
    return y


_ARGUMENTS = (
    "ptr %w, ptr %tile_rows, i64 %units, ptr %tile_steps, ptr %tile_y, i64 %y_stride, i64 %left, "
    "ptr %block_sums, ptr %block_steps, ptr %block_bias, ptr %tile_ahead, i64 %ahead_step"
)
"""Of a tile's function: the block's weights, the tile's rounded rows, units of K; where its steps
and results lie, and how far apart rows of these; channels from the block's first on; the block's
sums, steps and bias; what to ask the second cache for, and how much further with each unit."""


def kernel(tiling: Tiling, kind: str, numbers: Sequence[str], tile: Callable[[int], str]) -> str:
    """Return a kernel in LLVM's language: `native.compiled` takes it.

    Args:
        tiling: how it cuts its work.
        kind: LLVM's name of the type of x and y.
        numbers: more arguments of the tiles, i64.
        tile: makes the function of a tile of so many rows.
    """
    more = "".join(f", i64 %{name}" for name in numbers)
    tiles = "".join(
        f"define internal void @tile{rows}({_ARGUMENTS}{more}) {{\n{tile(rows)}  ret void\n}}\n"
        for rows in range(1, tiling.rows + 1)
    )
    functions = rounding.function(kind, tiling.unit) + results.function(kind, tiling.lanes) + tiles
    return f"""{native.DECLARED}{vectors.DECLARED}{functions}
define void @team(ptr %arguments) {{
entry:
{_fields(TENSORS, (*NUMBERS, *numbers))}
{_SHARES}
{_ROUNDING}
rounded:
  br i1 %alone, label %ready, label %wait
wait:
  call void @GOMP_barrier()
  br label %ready
ready:
  %some = icmp ult i64 %begin, %end
  br i1 %some, label %group, label %done
group:
  %g = phi i64 [ 0, %ready ], [ %g_end, %group_end ]
  %g_row = phi i64 [ 0, %ready ], [ %first_next, %group_end ]
  %g_next = add i64 %g, %together
  %g_last = icmp ult i64 %g_next, %tiles
  %g_end = select i1 %g_last, i64 %g_next, i64 %tiles
  %g_tiles = sub i64 %g_end, %g
  br label %block
block:
  %b = phi i64 [ %begin, %group ], [ %b_next, %block_end ]
  %w_off = mul i64 %b, %block_size
  %w = getelementptr i8, ptr %weight, i64 %w_off
  %single = icmp eq i64 %g_tiles, 1
  %ahead_off_w = select i1 %single, i64 {_AHEAD}, i64 %block_size
  %ahead = getelementptr i8, ptr %w, i64 %ahead_off_w
  %lines = udiv i64 %block_size, %units
  %ahead_step = udiv i64 %lines, %g_tiles
  %first_channel = mul i64 %b, {tiling.channels}
  %left = sub i64 %channels, %first_channel
  %block_sums = getelementptr i32, ptr %sums, i64 %first_channel
  %block_steps = getelementptr float, ptr %steps, i64 %first_channel
  %block_bias = getelementptr float, ptr %bias, i64 %first_channel
  br label %tile
{_tiles(tiling.rows, more)}
block_end:
  %b_next = add i64 %b, 1
  %more_blocks = icmp ult i64 %b_next, %end
  br i1 %more_blocks, label %block, label %group_end
group_end:
  br i1 %g_last, label %group, label %done
done:
  ret void
}}
"""


def _fields(tensors: Sequence[str], numbers: Sequence[str]) -> str:
    """Return code that reads the arguments."""
    code = ""
    for number, name in enumerate((*tensors, *numbers)):
        code += f"  %p{number} = getelementptr i64, ptr %arguments, i64 {number}\n"
        code += f"  %{name} = load {'ptr' if number < len(tensors) else 'i64'}, ptr %p{number}\n"
    return code


_SHARES = """
  %number32 = call i32 @omp_get_thread_num()
  %threads32 = call i32 @omp_get_num_threads()
  %number = zext i32 %number32 to i64
  %threads = zext i32 %threads32 to i64
  %next = add i64 %number, 1
  %low = udiv i64 %count, %tiles
  %high = add i64 %low, 1
  %longer = urem i64 %count, %tiles
  %longer_rows = mul i64 %longer, %high
  %row_size = mul i64 %units, 4
  %bytes = mul i64 %width, 2
  %y_stride = mul i64 %channels, 2
  %alone = icmp ne i64 %own, 0
  %own_off = mul i64 %own, %number
  %rows = getelementptr i8, ptr %all_rows, i64 %own_off
  %row_steps = getelementptr i8, ptr %all_row_steps, i64 %own_off
  %row_begin_of = mul i64 %count, %number
  %row_begin_share = udiv i64 %row_begin_of, %threads
  %row_begin = select i1 %alone, i64 0, i64 %row_begin_share
  %row_end_of = mul i64 %count, %next
  %row_end_share = udiv i64 %row_end_of, %threads
  %row_end = select i1 %alone, i64 %count, i64 %row_end_share
  %begin_of = mul i64 %blocks, %number
  %begin = udiv i64 %begin_of, %threads
  %end_of = mul i64 %blocks, %next
  %end = udiv i64 %end_of, %threads
  br label %rounding
"""
"""A thread's rows to round, and its blocks. The first %longer tiles have %high rows, the others
%low."""

_ROUNDING = """
rounding:
  %r = phi i64 [ %row_begin, %entry ], [ %r_next, %round ]
  %more_rows = icmp ult i64 %r, %row_end
  br i1 %more_rows, label %round, label %rounded
round:
  %in_longer = icmp ult i64 %r, %longer_rows
  %r_size = select i1 %in_longer, i64 %high, i64 %low
  %r_base = select i1 %in_longer, i64 0, i64 %longer_rows
  %r_after = sub i64 %r, %r_base
  %r_inside = urem i64 %r_after, %r_size
  %r_first = sub i64 %r, %r_inside
  %x_off = mul i64 %r, %bytes
  %x_at = getelementptr i8, ptr %x, i64 %x_off
  %to_off = mul i64 %r_first, %row_size
  %to_tile = getelementptr i8, ptr %rows, i64 %to_off
  %to = getelementptr i32, ptr %to_tile, i64 %r_inside
  %step_to = getelementptr float, ptr %row_steps, i64 %r
  %to_stride = mul i64 %r_size, 4
  call void @round(ptr %x_at, i64 %width, ptr %to, i64 %to_stride, ptr %step_to)
  %r_next = add i64 %r, 1
  br label %rounding
"""


def _tiles(most: int, more: str) -> str:
    """Return code that multiplies a block by a group's tiles."""
    cases = "".join(f"    i64 {rows}, label %rows{rows}\n" for rows in range(1, most))
    calls = "".join(
        f"rows{rows}:\n  call void @tile{rows}({_ARGUMENTS}{more})\n  br label %tile_end\n"
        for rows in range(1, most + 1)
    )
    return f"""
tile:
  %t = phi i64 [ %g, %block ], [ %t_next, %tile_end ]
  %first = phi i64 [ %g_row, %block ], [ %first_next, %tile_end ]
  %long = icmp ult i64 %t, %longer
  %size = select i1 %long, i64 %high, i64 %low
  %tile_off = mul i64 %first, %row_size
  %tile_rows = getelementptr i8, ptr %rows, i64 %tile_off
  %tile_steps = getelementptr float, ptr %row_steps, i64 %first
  %y_row = mul i64 %first, %channels
  %y_off = add i64 %y_row, %first_channel
  %tile_y = getelementptr i16, ptr %y, i64 %y_off
  %ahead_off0 = mul i64 %ahead_step, %units
  %t_inside = sub i64 %t, %g
  %ahead_off = mul i64 %ahead_off0, %t_inside
  %tile_ahead = getelementptr i8, ptr %ahead, i64 %ahead_off
  switch i64 %size, label %rows{most} [
{cases}  ]
{calls}
tile_end:
  %first_next = add i64 %first, %size
  %t_next = add i64 %t, 1
  %more_tiles = icmp ult i64 %t_next, %g_end
  br i1 %more_tiles, label %tile, label %block_end
"""
