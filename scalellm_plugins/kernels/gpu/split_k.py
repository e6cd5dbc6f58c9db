"""The end of a product whose K is split over several programs, without a second launch.

With few rows, blocks of channels are too few to keep a GPU's memory busy, so each is worked on by
several programs, each with a part of K. All store their sums; the last to arrive adds them, always
in the same order, so that a result does not depend on who was last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def end(
    total,
    factors,
    bias,
    y,
    parts,
    counters,
    rows,
    channels,
    m,
    n,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Store y = (sum of all programs' `total` [BM, BN]) · factors + bias.

    m [BM], n [BN]: which rows and channels; factors, bias float32 [channels]; parts float32
    [SPLIT, rows, channels]; counters int32, one per block of y, 0 before and after.
    """
    inside = (m[:, None] < rows) & (n[None, :] < channels)
    # Wide: parts of a large product are more than 2³¹ bytes.
    place = m.to(tl.int64)[:, None] * channels + n[None, :]
    if SPLIT == 1:
        _store(total, factors, bias, y, place, n, channels, inside, HAS_BIAS)
    else:
        part = tl.cast(rows, tl.int64) * channels
        tl.store(parts + tl.program_id(2) * part + place, total, inside)
        tl.debug_barrier()  # all threads of this program have stored before one of them counts
        counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
            whole = tl.zeros_like(total)
            for other in range(SPLIT):
                # Past the first cache, which does not see what other programs have stored.
                whole += tl.load(parts + other * part + place, inside, 0.0, cache_modifier=".cg")
            _store(whole, factors, bias, y, place, n, channels, inside, HAS_BIAS)
            tl.store(counter, 0)


@triton.jit
def _store(
    total,
    factors,
    bias,
    y,
    place,
    n,
    channels,
    inside,
    HAS_BIAS: tl.constexpr,
):
    result = total * tl.load(factors + n, n < channels, 0.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + n, n < channels, 0.0)[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), inside)


class Shape:
    """How a product [rows, channels] is cut: tiles, and how often K is split.

    Args:
        rows, channels: of y.
        steps: into how many steps of a program's loop K falls: no more parts than that.
        device: whose number of multiprocessors counts.
        tallest: rows of a tile at most, as many as its sums have registers for.
    """

    def __init__(
        self, rows: int, channels: int, steps: int, device: torch.device, tallest: int = 128
    ) -> None:
        self.rows = min(tallest, max(16, triton.next_power_of_2(rows)))
        self.channels = 64 if rows <= 32 else 128
        blocks = triton.cdiv(rows, self.rows) * triton.cdiv(channels, self.channels)
        # Four programs to a multiprocessor hide the memory's latency; more only add parts.
        self.split = max(1, min(4 * _multiprocessors(device) // blocks, steps // 4, 16))
        if rows > 64:
            self.split = 1  # arithmetic binds
        self.grid = (
            triton.cdiv(channels, self.channels),
            triton.cdiv(rows, self.rows),
            self.split,
        )


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # in the interpreter: enough that K is split
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch(
    kernel: Any,
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    counters: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    step: int,
    tallest: int = 128,
    **constants: Any,
) -> torch.Tensor:
    """Run a product's kernel, and return y [M, N].

    Args:
        kernel: takes x, the weight's tensors, bias, y, parts, counters, rows, channels, width, and
            as constants SPLIT, ROWS, CHANNELS, HAS_BIAS and its own.
        x: [M, K], contiguous.
        weight: the last tensor are the factors, float32 [N].
        counters: those of this weight.
        bias: float32 [N].
        step: of K, per step of the kernel's loop.
        tallest: see `Shape`.
    """
    rows, width = x.shape
    if rows == 0:
        return y
    shape = Shape(rows, y.shape[1], triton.cdiv(width, step), x.device, tallest)
    sizes = (shape.split, *y.shape) if shape.split > 1 else (0,)
    kernel[shape.grid](
        x,
        *weight,
        weight[-1] if bias is None else bias,
        y,
        torch.empty(sizes, dtype=torch.float32, device=x.device),
        counters,
        rows,
        y.shape[1],
        width,
        SPLIT=shape.split,
        ROWS=shape.rows,
        CHANNELS=shape.channels,
        HAS_BIAS=bias is not None,
        num_warps=4 if rows <= 32 else 8,
        num_stages=4,
        **constants,
    )
    return y


def counters(channels: int, device: torch.device) -> torch.Tensor:
    """Return zeros int32 for every block that a product of at most 64 rows has; a weight's own.

    Products of one weight are made one after the other on one stream, as in a model.
    """
    return torch.zeros(triton.cdiv(channels, 64), dtype=torch.int32, device=device)
