"""Weights to integers: scales that minimise the weights' error, and the packed words.

The scale of a group is searched, not taken from its largest weight: the range is shrunk step by
step, which clips a few weights and rounds all the others more finely, and the scale with the least
squared error stays (OMSE, Choukroun et al., arXiv 1902.06822). With its integers fixed, the error
is a parabola in the scale, whose vertex is tried, too. Every candidate is rounded to the dtype in
which it will be stored before it is judged, so that what a server computes is what was judged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

SHRINKS = {4: (0.5, 25), 8: (0.8, 9)}
"""bits → (smallest share of the range, candidates). Eight bits gain little from clipping."""

BLOCK = 1 << 18
"""Weights that are searched at once, by one thread: their float32 copies stay in a core's cache.
Blocks in threads, not torch's own threads in each operation, which meet after every one: on two
cores that others used, too, the demo model took 93 s instead of 0.3."""


class Quantized:
    """Integers and what they are worth: weight = (codes - zero_points) × scales.

    Attributes:
        codes: int8, (out, in).
        scales: (out, groups), in the weights' dtype.
        zero_points: int8, (out, groups), or None where they are zero.
    """

    def __init__(self, codes: Tensor, scales: Tensor, zero_points: Tensor | None) -> None:
        self.codes, self.scales, self.zero_points = codes, scales, zero_points

    def weights(self) -> Tensor:
        """The weights that a server computes with: float32, (out, in)."""
        groups = _grouped(self.codes, self.scales.shape[1]).float()
        if self.zero_points is not None:
            groups = groups - self.zero_points.unsqueeze(-1)
        return (groups * self.scales.float().unsqueeze(-1)).flatten(1)


def quantize(weight: Tensor, bits: int, group_size: int, symmetric: bool = True) -> Quantized:
    """Quantize a matrix, (out, in), whose width is a multiple of `group_size`.

    Raises:
        ValueError: a weight is infinite or not a number.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("it has weights that are infinite or not a number")
    rows = max(1, BLOCK // weight.shape[1])

    def search(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _search(_grouped(block, block.shape[1] // group_size), bits, symmetric)

    with _own_threads() as threads:
        parts = list(threads.map(search, weight.split(rows)))
    codes, scales, zero_points = (torch.cat(column) for column in zip(*parts, strict=True))
    return Quantized(codes.flatten(1), scales, None if symmetric else zero_points)


@contextmanager
def _own_threads() -> Iterator[ThreadPoolExecutor]:
    """A thread for each core; torch uses one in each meanwhile."""
    cores, before = len(os.sched_getaffinity(0)), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            yield threads
    finally:
        torch.set_num_threads(before)


def _grouped(matrix: Tensor, groups: int) -> Tensor:
    return matrix.reshape(matrix.shape[0], groups, -1)


def _search(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (rows, groups, size), scales and zero points (rows, groups) with the least error."""
    dtype, values = groups.dtype, groups.float()
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    smallest, steps = SHRINKS[bits]
    best = _Best(values, low, high, dtype)
    if symmetric:
        top = values.abs().amax(-1)
        for share in torch.linspace(1.0, smallest, steps).tolist():
            best.offer(top * (share / high), torch.zeros_like(top))
    else:
        # A group of one sign keeps zero among its values: padding and pruned weights stay exact.
        floor, top = values.amin(-1).clamp(max=0.0), values.amax(-1).clamp(min=0.0)
        for share in torch.linspace(1.0, smallest, steps).tolist():
            scale = (top - floor) * (share / (high - low))
            zero = (low - floor * share / _nonzero(scale)).round().clamp(low, high)
            best.offer(scale, zero)
    best.offer(best.vertex(), best.zeros)
    return best.codes.to(torch.int8), best.scales.to(dtype), best.zeros.to(torch.int8)


class _Best:
    """The best candidate so far, for each group."""

    def __init__(self, values: Tensor, low: int, high: int, dtype: torch.dtype) -> None:
        self._values, self._low, self._high, self._dtype = values, low, high, dtype
        self.scales = torch.ones(values.shape[:-1])
        self.zeros = torch.zeros(values.shape[:-1])
        self.codes = torch.zeros_like(values)
        self._errors = torch.full(values.shape[:-1], torch.inf)

    def offer(self, scales: Tensor, zeros: Tensor) -> None:
        """Keep these scales and zero points where they are better."""
        stored = _nonzero(scales.to(self._dtype).float())
        step, zero = stored.unsqueeze(-1), zeros.unsqueeze(-1)
        codes = (self._values / step + zero).round_().clamp_(self._low, self._high)
        errors = ((codes - zero) * step - self._values).square_().sum(-1)
        better = errors < self._errors
        self.scales = torch.where(better, stored, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)
        self._errors = torch.where(better, errors, self._errors)
        self.codes = torch.where(better.unsqueeze(-1), codes, self.codes)

    def vertex(self) -> Tensor:
        """The scale with the least error for the integers at hand: <w, q> / <q, q>."""
        integers = self.codes - self.zeros.unsqueeze(-1)
        square = integers.square().sum(-1)
        found = (self._values * integers).sum(-1) / _nonzero(square)
        # All integers zero, or none with the weights' sign: no scale follows from them.
        return torch.where(found > 0, found, self.scales)


def _nonzero(scales: Tensor) -> Tensor:
    """A group of zeros, or of weights too small for the dtype, gets any scale and integers 0."""
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def pack(codes: Tensor, bits: int, axis: int = 1) -> Tensor:
    """Pack int8 codes into int32 words along an axis, the first in the lowest bits.

    Codes are stored with an offset of 2^(bits-1), so that they are not negative: uint4b8 and
    uint8b128 in vLLM's words. The axis' length must fill whole words.
    """
    if axis == 0:
        return pack(codes.t(), bits).t().contiguous()
    count = 32 // bits
    words = torch.zeros(codes.shape[0], codes.shape[1] // count, dtype=torch.int32)
    for place in range(count):  # a loop, so that no copy is wider than the words
        part = codes[:, place::count].to(torch.int32) + (1 << bits - 1)
        words |= part << bits * place
    return words


def unpack(words: Tensor, bits: int, axis: int = 1) -> Tensor:
    """Undo `pack`: int32 words to int8 codes."""
    if axis == 0:
        return unpack(words.t(), bits).t().contiguous()
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return (codes - (1 << bits - 1)).to(torch.int8).flatten(1)
