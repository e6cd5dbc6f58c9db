"""From a weight to small integers: rounding, and the search for scales that round best. Pure torch.

No calibration data: what is minimised is the squared error of the weight itself. The search goes
over clipping ratios and keeps, group by group, the best one, as the option `mse` of the code that
came with GPTQ does (arXiv 2210.17323). Scales of groups are whole multiples of one step per channel
(QServe, arXiv 2405.04532), so that a 4-bit weight is an 8-bit number too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

RATIOS = (1.0, 0.94, 0.88, 0.82, 0.75, 0.68)
"""Clipping ratios that are tried: with four bits the best is mostly between 0.75 and 1."""

_WHOLE = 119
"""The largest weight of a channel in its steps. Rounding to 4 bits adds at most 8 to it (the
protective range of QServe), which stays within 8 bits."""

_CHUNK = 1 << 20
"""Weights that are worked on at a time: temporaries are a few MB, whatever the layer's size."""


@dataclass(frozen=True)
class Int8Weight:
    """q int8 [N, K], scales float32 [N]: weight ≈ q · scale."""

    q: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class Int4Weight:
    """q uint8 [N, K] in 0..15, zeros and multipliers int8 [N, K / group], steps float32 [N].

    weight ≈ (q - zero) · multiplier · step, and (q - zero) · multiplier is within 8 bits.
    """

    q: torch.Tensor
    zeros: torch.Tensor
    multipliers: torch.Tensor
    steps: torch.Tensor


def group_for(in_features: int, wanted: int) -> int:
    """Return the largest group size of at most `wanted` that fits, a multiple of 32; 0 if none."""
    for group in range(wanted - wanted % 32, 0, -32):
        # Depth blocks of the kernel are 128 of K or a group, whichever is less.
        if in_features % group == 0 and (group <= 128 or group % 128 == 0):
            return group
    return 0


def to_int8(weight: torch.Tensor) -> Int8Weight:
    """Round a weight [N, K] to 8 bits, one symmetric scale per channel; zeros stay zeros."""
    channels, width = weight.shape
    q = torch.empty((channels, width), dtype=torch.int8, device=weight.device)
    scales = torch.empty(channels, dtype=torch.float32, device=weight.device)
    for rows in _chunks(channels, width):
        part = weight[rows].to(torch.float32, copy=True)
        # A number that bfloat16 has, too: some kernels take the scale so.
        scale = part.abs().amax(dim=1).div_(127).bfloat16().float()
        scale[scale == 0] = 1
        q[rows] = part.div_(scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        scales[rows] = scale
    return Int8Weight(q, scales)


def to_int4(
    weight: torch.Tensor, group: int, *, symmetric: bool = False, search: bool = True
) -> Int4Weight:
    """Round a weight [N, K] to 4 bits in groups of `group` along K.

    Args:
        symmetric: the zero is 8 in every group; otherwise it is where the group's zero lies.
        search: try `RATIOS`; otherwise no weight is clipped.
    """
    channels, width = weight.shape
    groups = width // group
    found = Int4Weight(
        torch.empty((channels, width), dtype=torch.uint8, device=weight.device),
        torch.empty((channels, groups), dtype=torch.int8, device=weight.device),
        torch.empty((channels, groups), dtype=torch.int8, device=weight.device),
        torch.empty(channels, dtype=torch.float32, device=weight.device),
    )
    ratios = RATIOS if search else RATIOS[:1]
    for rows in _chunks(channels, width):
        part = weight[rows].to(torch.float32, copy=True)
        steps = part.abs().amax(dim=1).div_(_WHOLE)
        steps[steps == 0] = 1
        whole = part.div_(steps[:, None]).view(-1, groups, group)
        q, zeros, multipliers = _best(whole, symmetric, ratios)
        found.q[rows] = q.view(-1, width).to(torch.uint8)
        found.zeros[rows] = zeros.squeeze(2).to(torch.int8)
        found.multipliers[rows] = multipliers.squeeze(2).to(torch.int8)
        found.steps[rows] = steps
    return found


def _best(
    whole: torch.Tensor, symmetric: bool, ratios: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, zeros and multipliers, as float, of the ratio with the least error per group."""
    low = whole.amin(dim=2, keepdim=True).clamp_(max=0)
    high = whole.amax(dim=2, keepdim=True).clamp_(min=0)
    # Symmetric: seven steps up, eight down; the longer side decides.
    span = torch.maximum(high / 7, -low / 8) if symmetric else (high - low) / 15
    least = multipliers = zeros = None
    for ratio in ratios:
        trial = (span * ratio).round_().clamp_(min=1)
        if ratio == 1.0:
            trial = span.ceil().clamp_(min=1)  # nothing is clipped
        zero = torch.full_like(trial, 8) if symmetric else (-low * ratio / trial).round_()
        zero.clamp_(0, 15)
        error = _round(whole, trial, zero).sub_(zero).mul_(trial).sub_(whole).square_()
        error = error.sum(dim=2, keepdim=True)
        if least is None:
            least, multipliers, zeros = error, trial, zero
        else:
            better = error < least
            least = torch.where(better, error, least)
            multipliers = torch.where(better, trial, multipliers)
            zeros = torch.where(better, zero, zeros)
    assert multipliers is not None
    assert zeros is not None
    return _round(whole, multipliers, zeros), zeros, multipliers


def _round(whole: torch.Tensor, multiplier: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return (whole / multiplier).round_().add_(zero).clamp_(0, 15)


def _chunks(channels: int, width: int) -> list[slice]:
    rows = max(1, _CHUNK // width)
    return [slice(first, min(first + rows, channels)) for first in range(0, channels, rows)]
