"""What the kernels that are compiled here share: threads, blocks of channels, tiles of rows.

A kernel works on blocks of channels, each thread on its share of them, and multiplies a block by
all rows, a tile of them at a time, whose sums stay in registers. First the threads round the rows,
each its share: by the row's largest value, to ±127. `tiles.py` has the code of a tile for vectors
of 512 bits, `narrow.py` for 256.

Rounded rows lie as a tile reads them: [tile][unit][row of the tile], a unit being 4 bytes. Tiles
differ by one row at most, so that none is filled up with rows that nobody needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import native

DEPTH = 16
"""K is filled up with zeros to a multiple of it."""

TENSORS = (
    "x",  # bfloat16 or float16 [M, K]
    "rows",  # uint8 [M, units * 4]: scratch for the rounded rows
    "row_steps",  # float32 [M]: scratch
    "y",  # [M, N], as x
    "weight",
    "sums",  # int32 [blocks * channels]: what is taken off a channel's sum
    "steps",  # float32 [blocks * channels]
    "bias",  # float32 [N]
)
NUMBERS = ("count", "width", "channels", "units", "blocks", "block_size", "tiles", "together")
"""M, K, N; units of a row; blocks, and bytes of one; tiles of rows, and how many before the next
block."""

KINDS = {torch.bfloat16: "bfloat", torch.float16: "half"}
"""Types of x and y, and LLVM's names for them."""


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work.

    Attributes:
        channels: of a block.
        rows: of a tile, at the most.
        unit: how many of K are 4 bytes of a rounded row.
        together: rows that are multiplied by a block before the next one, about: they stay in L2.
    """

    channels: int
    rows: int
    unit: int
    together: int


@dataclass(frozen=True)
class Weight:
    """A packed weight: `TENSORS` from "weight" to "steps", then the kernel's own.

    Attributes:
        block_size: bytes of a block as its tiles read it.
        tensors, numbers: more arguments.
    """

    weight: torch.Tensor
    sums: torch.Tensor
    steps: torch.Tensor
    block_size: int
    tensors: Sequence[torch.Tensor] = ()
    numbers: Sequence[int] = ()


def multiply(
    run: native.Run, tiling: Tiling, x: torch.Tensor, weight: Weight, bias: torch.Tensor
) -> torch.Tensor:
    """Return y [M, N] for x [M, K], contiguous and of the kernel's type, and bias float32 [N]."""
    count, width = x.shape
    channels, blocks = bias.shape[0], weight.steps.shape[0] // tiling.channels
    units = -(-width // DEPTH) * DEPTH // tiling.unit
    y = torch.empty((count, channels), dtype=x.dtype)
    scratch = torch.empty(count * (units + 1) * 4, dtype=torch.uint8)  # one call instead of two
    rows = scratch.data_ptr()
    given = (y, weight.weight, weight.sums, weight.steps, bias, *weight.tensors)
    addresses = (tensor.data_ptr() for tensor in given)
    tiles, together = -(-count // tiling.rows), max(1, tiling.together // tiling.rows)
    sizes = (count, width, channels, units, blocks, weight.block_size, tiles, together)
    arguments = (x.data_ptr(), rows, rows + count * units * 4, *addresses, *sizes, *weight.numbers)
    run(arguments, min(torch.get_num_threads(), blocks))
    return y


ARGUMENTS = (
    "ptr %w, ptr %tile_rows, i64 %units, ptr %tile_steps, ptr %tile_y, i64 %y_stride, i64 %left, "
    "ptr %block_sums, ptr %block_steps, ptr %block_bias, ptr %tile_ahead, i64 %ahead_step"
)
"""Of a tile's function: the block's weights, the tile's rounded rows, units of K; where its steps
and results lie, and how far apart rows of these; channels from the block's first on; the block's
sums, steps and bias; what to ask the second cache for, and how much further with each 4 of K."""


def kernel(
    tiling: Tiling,
    tensors: Sequence[str],
    numbers: Sequence[str],
    block: str,
    functions: str,
    more: str = "",
) -> str:
    """Return a kernel in LLVM's language: `native.compiled` takes it.

    Args:
        tiling: how it cuts its work.
        tensors, numbers: more arguments, after those of `TENSORS` and of `NUMBERS`.
        block: code that begins a block, number %b; it sets %w, %ahead and %ahead_step, see
            `ARGUMENTS`. It starts in the basic block %block and ends in %block_ready. %g_tiles
            tiles will follow, %number is the thread's.
        functions: what it calls: `round`, which writes a row's units and its step, and for each
            number of rows a `tile` with `ARGUMENTS`.
        more: arguments of the tiles, after those.
    """
    return f"""{native.DECLARED}{functions}
define void @team(ptr %arguments) {{
entry:
{_fields((*TENSORS, *tensors), (*NUMBERS, *numbers))}
{_SHARES}
{_ROUNDING}
rounded:
  call void @GOMP_barrier()
  %some = icmp ult i64 %begin, %end
  br i1 %some, label %group, label %done
group:
  %g = phi i64 [ 0, %rounded ], [ %g_end, %group_end ]
  %g_row = phi i64 [ 0, %rounded ], [ %first_next, %group_end ]
  %g_next = add i64 %g, %together
  %g_last = icmp ult i64 %g_next, %tiles
  %g_end = select i1 %g_last, i64 %g_next, i64 %tiles
  %g_tiles = sub i64 %g_end, %g
  br label %block
block:
  %b = phi i64 [ %begin, %group ], [ %b_next, %block_end ]
{block}
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
  %row_begin_of = mul i64 %count, %number
  %row_begin = udiv i64 %row_begin_of, %threads
  %row_end_of = mul i64 %count, %next
  %row_end = udiv i64 %row_end_of, %threads
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
        f"rows{rows}:\n  call void @tile{rows}({ARGUMENTS}{more})\n  br label %tile_end\n"
        for rows in range(1, most + 1)
    )
    return f"""
tile:
  %t = phi i64 [ %g, %block_ready ], [ %t_next, %tile_end ]
  %first = phi i64 [ %g_row, %block_ready ], [ %first_next, %tile_end ]
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
