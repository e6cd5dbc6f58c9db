"""LLVM code that the kernels for 8-bit and 4-bit weights share: rows to 8 bits, tiles of rows.

A kernel works on blocks of 32 channels, each thread on its share of them, and multiplies a block by
all rows, a tile of them at a time: their sums stay in registers, two vectors a row. First the
threads round the rows, each its share: to int8 by the row's largest value, moved up by 128 (the
product of `vpdpbusd` is one of unsigned by signed bytes). 128 times a channel's sum is taken off
the sums again.

Rounded rows lie as a tile reads them: [tile][K / 4][row of the tile][4]. Weights: [K / 4][32][4].
Tiles differ by one row at most, so that none is filled up with rows that nobody needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import native, rounding, vectors

CHANNELS = 32
"""Channels of a block."""

DEPTH = 16
"""K is filled up with zeros to a multiple of it."""

TILE = 12
"""Most rows that are multiplied together: 24 sums; the rest of 32 registers is for operands."""

_TOGETHER = 48
"""Rows that are multiplied by a block before the next: with two blocks, they stay in L2."""

NEEDS = ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16")
"""Features of the processor."""

TENSORS = (
    "x",  # bfloat16 or float16 [M, K]
    "rows",  # uint8 [M, K], K filled up: scratch for the rounded rows
    "row_steps",  # float32 [M]: scratch
    "y",  # [M, N], as x
    "weight",
    "sums",  # int32 [blocks * 32]: 128 times the sum of a channel
    "steps",  # float32 [blocks * 32]
    "bias",  # float32 [N]
)
NUMBERS = ("count", "width", "channels", "quads", "blocks", "tiles", "together")
"""M, K, N; K / 4, filled up; blocks; tiles of rows, and how many before the next block."""

KINDS = {torch.bfloat16: "bfloat", torch.float16: "half"}
"""Types of x and y, and LLVM's names for them."""


def multiply(
    run: native.Run,
    x: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    steps: torch.Tensor,
    bias: torch.Tensor,
    tensors: Sequence[torch.Tensor] = (),
    numbers: Sequence[int] = (),
    together: int = _TOGETHER,
) -> torch.Tensor:
    """Return y [M, N] for x [M, K], by a kernel that `kernel` wrote.

    Args:
        run: the kernel.
        x: contiguous, of the kernel's type.
        weight, sums, steps, bias: see `TENSORS`.
        tensors, numbers: the kernel's own.
        together: rows that a block is multiplied by before the next one, about.
    """
    count, width = x.shape
    channels, blocks = bias.shape[0], steps.shape[0] // CHANNELS
    deep = -(-width // DEPTH) * DEPTH
    y = torch.empty((count, channels), dtype=x.dtype)
    scratch = torch.empty(count * (deep + 4), dtype=torch.uint8)  # one call instead of two
    rows = scratch.data_ptr()
    given = (y, weight, sums, steps, bias, *tensors)
    addresses = (tensor.data_ptr() for tensor in given)
    tiles = -(-count // TILE)
    sizes = (count, width, channels, deep // 4, blocks, tiles, max(1, together // TILE), *numbers)
    arguments = (x.data_ptr(), rows, rows + count * deep, *addresses, *sizes)
    run(arguments, min(torch.get_num_threads(), blocks))
    return y


def kernel(kind: str, tensors: Sequence[str], numbers: Sequence[str], block: str, more: str) -> str:
    """Return a kernel in LLVM's language: `native.compiled` takes it.

    Args:
        kind: of x and y, LLVM's name.
        tensors, numbers: more arguments, after those of `TENSORS` and of `NUMBERS`.
        block: code that begins a block, number %b; it sets %w, the block's weights as 8 bits,
            %ahead and %ahead_step: with each 4 of K, a tile asks the second cache for 128 bytes
            there. It starts in the basic block %block and ends in %block_ready. %g_tiles tiles
            will follow, %number is the thread's.
        more: functions that it calls.
    """
    names = (*TENSORS, *tensors, *NUMBERS, *numbers)
    fields = ""
    for number, name in enumerate(names):
        fields += f"  %p{number} = getelementptr i64, ptr %arguments, i64 {number}\n"
        pointer = number < len(TENSORS) + len(tensors)
        fields += f"  %{name} = load {'ptr' if pointer else 'i64'}, ptr %p{number}\n"
    cases = "".join(f"    i64 {rows}, label %rows{rows}\n" for rows in range(1, TILE))
    calls = "".join(_call(rows) for rows in range(1, TILE + 1))
    return f"""{native.DECLARED}{vectors.DECLARED}{more}{rounding.function(kind)}
{"".join(_tile(kind, rows) for rows in range(1, TILE + 1))}
define void @team(ptr %arguments) {{
entry:
{fields}
  %number32 = call i32 @omp_get_thread_num()
  %threads32 = call i32 @omp_get_num_threads()
  %number = zext i32 %number32 to i64
  %threads = zext i32 %threads32 to i64
  %next = add i64 %number, 1
  %low = udiv i64 %count, %tiles
  %high = add i64 %low, 1
  %longer = urem i64 %count, %tiles
  %longer_rows = mul i64 %longer, %high
  %deep = mul i64 %quads, 4
  %bytes = mul i64 %width, 2
  %y_stride = mul i64 %channels, 2
  %weight_size = mul i64 %quads, 128
  %row_begin_of = mul i64 %count, %number
  %row_begin = udiv i64 %row_begin_of, %threads
  %row_end_of = mul i64 %count, %next
  %row_end = udiv i64 %row_end_of, %threads
  %begin_of = mul i64 %blocks, %number
  %begin = udiv i64 %begin_of, %threads
  %end_of = mul i64 %blocks, %next
  %end = udiv i64 %end_of, %threads
  br label %rounding
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
  %to_off = mul i64 %r_first, %deep
  %to_tile = getelementptr i8, ptr %rows, i64 %to_off
  %to = getelementptr i32, ptr %to_tile, i64 %r_inside
  %step_to = getelementptr float, ptr %row_steps, i64 %r
  %to_stride = mul i64 %r_size, 4
  call void @round(ptr %x_at, i64 %width, ptr %to, i64 %to_stride, ptr %step_to)
  %r_next = add i64 %r, 1
  br label %rounding
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
  %first_channel = mul i64 %b, {CHANNELS}
  %left = sub i64 %channels, %first_channel
  %block_sums = getelementptr i32, ptr %sums, i64 %first_channel
  %block_steps = getelementptr float, ptr %steps, i64 %first_channel
  %block_bias = getelementptr float, ptr %bias, i64 %first_channel
  br label %tile
tile:
  %t = phi i64 [ %g, %block_ready ], [ %t_next, %tile_end ]
  %first = phi i64 [ %g_row, %block_ready ], [ %first_next, %tile_end ]
  %long = icmp ult i64 %t, %longer
  %size = select i1 %long, i64 %high, i64 %low
  %tile_off = mul i64 %first, %deep
  %tile_rows = getelementptr i8, ptr %rows, i64 %tile_off
  %tile_steps = getelementptr float, ptr %row_steps, i64 %first
  %y_row = mul i64 %first, %channels
  %y_off = add i64 %y_row, %first_channel
  %tile_y = getelementptr i16, ptr %y, i64 %y_off
  %ahead_off0 = mul i64 %ahead_step, %quads
  %t_inside = sub i64 %t, %g
  %ahead_off = mul i64 %ahead_off0, %t_inside
  %tile_ahead = getelementptr i8, ptr %ahead, i64 %ahead_off
  switch i64 %size, label %rows{TILE} [
{cases}  ]
{calls}
tile_end:
  %first_next = add i64 %first, %size
  %t_next = add i64 %t, 1
  %more_tiles = icmp ult i64 %t_next, %g_end
  br i1 %more_tiles, label %tile, label %block_end
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


_ARGUMENTS = (
    "ptr %w, ptr %tile_rows, i64 %quads, ptr %tile_steps, ptr %tile_y, i64 %y_stride, i64 %left, "
    "ptr %block_sums, ptr %block_steps, ptr %block_bias, ptr %tile_ahead, i64 %ahead_step"
)


def _call(rows: int) -> str:
    return f"rows{rows}:\n  call void @tile{rows}({_ARGUMENTS})\n  br label %tile_end\n"


def _tile(kind: str, rows: int) -> str:
    """Return the function that multiplies so many rows by a block."""
    # Few sums wait for themselves: then several 4 of K have sums of their own, added at the end.
    apart = 4 if rows <= 2 else 2 if rows <= 4 else 1
    sums, step, end = "", "", ""
    for quad in range(apart):
        for half in (0, 1):
            at = quad * CHANNELS * 4 + half * 64
            step += vectors.load(f"w{quad}_{half}", "i32", "%w_at", at)
            step += vectors.prefetch(f"ahead{quad}_{half}", "%ahead_at", at, 2)
        for row in range(rows):
            step += vectors.load_one(f"a{quad}_{row}", "i32", "%a_at", (quad * rows + row) * 4)
            for half in (0, 1):
                name = f"{quad}_{row}_{half}"
                sums += (
                    f"  %s{name} = phi <16 x i32> [ zeroinitializer, %entry ], [ %n{name}, %k ]\n"
                )
                step += (
                    f"  %n{name} = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> "
                    f"%s{name}, <16 x i32> %a{quad}_{row}, <16 x i32> %w{quad}_{half})\n"
                )
    for half in (0, 1):
        end += f"  %left{half} = sub i64 %left, {half * 16}\n"
        end += vectors.lanes(f"mask{half}", f"%left{half}")
        end += vectors.load(f"sums{half}", "i32", "%block_sums", half * 64)
        end += vectors.load(f"steps{half}", "float", "%block_steps", half * 64)
        end += vectors.load_masked(f"bias{half}", "float", "%block_bias", half * 64, f"%mask{half}")
    for row in range(rows):
        end += vectors.load_one(f"rs{row}", "float", "%tile_steps", row * 4)
        end += f"  %y_off{row} = mul i64 %y_stride, {row}\n"
        end += f"  %y{row} = getelementptr i8, ptr %tile_y, i64 %y_off{row}\n"
        for half in (0, 1):
            name, total = f"{row}_{half}", f"%n0_{row}_{half}"
            for quad in range(1, apart):
                end += f"  %c{quad}_{name} = add <16 x i32> {total}, %n{quad}_{name}\n"
                total = f"%c{quad}_{name}"
            end += f"""
  %d{name} = sub <16 x i32> {total}, %sums{half}
  %f{name} = sitofp <16 x i32> %d{name} to <16 x float>
  %r{name} = fmul <16 x float> %f{name}, %rs{row}
  %t{name} = fmul <16 x float> %r{name}, %steps{half}
  %u{name} = fadd <16 x float> %t{name}, %bias{half}
  %b{name} = fptrunc <16 x float> %u{name} to <16 x {kind}>
  %i{name} = bitcast <16 x {kind}> %b{name} to <16 x i16>
"""
            end += vectors.store_masked(f"i{name}", f"%y{row}", half * 32, f"%mask{half}")
    return f"""
define internal void @tile{rows}({_ARGUMENTS}) {{
entry:
  br label %k
k:
  %i = phi i64 [ 0, %entry ], [ %i_next, %k ]
{sums}
  %w_off = mul i64 %i, {CHANNELS * 4}
  %w_at = getelementptr i8, ptr %w, i64 %w_off
  %a_off = mul i64 %i, {rows * 4}
  %a_at = getelementptr i8, ptr %tile_rows, i64 %a_off
  %ahead_off = mul i64 %i, %ahead_step
  %ahead_at = getelementptr i8, ptr %tile_ahead, i64 %ahead_off
{step}
  %i_next = add i64 %i, {apart}
  %more = icmp ult i64 %i_next, %quads
  br i1 %more, label %k, label %end
end:
{end}
  ret void
}}
"""
