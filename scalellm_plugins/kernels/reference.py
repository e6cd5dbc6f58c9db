"""What the kernels must compute, in float64 and without cleverness: the oracle of their tests."""

from __future__ import annotations

import torch


def int8_weight(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the weight [N, K] that q int8 [N, K] and one scale per channel [N] stand for."""
    return q.double() * scales.double()[:, None]


def int4_weight(
    q: torch.Tensor, zeros: torch.Tensor, multipliers: torch.Tensor, steps: torch.Tensor
) -> torch.Tensor:
    """Return the weight [N, K] that 4-bit numbers in groups along K stand for.

    q [N, K] in 0..15; zeros and multipliers [N, K // group], small integers; steps [N].
    """
    group = q.shape[1] // zeros.shape[1]
    whole = (q.double() - _spread(zeros, group)) * _spread(multipliers, group)
    return whole * steps.double()[:, None]


def _spread(per_group: torch.Tensor, group: int) -> torch.Tensor:
    return per_group.double().repeat_interleave(group, dim=1)


def quantized_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x [M, K] rounded to 8 bits row by row: 127 steps either side of zero, to the largest.

    A row of zeros stays one.
    """
    wide = x.double()
    steps = wide.abs().amax(dim=1, keepdim=True) / 127
    return torch.where(steps > 0, (wide / steps).round() * steps, wide)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x [M, K] times weight [N, K] transposed, plus bias [N]."""
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, residual: torch.Tensor | None
) -> torch.Tensor:
    """Return x [M, K], plus residual [M, K], over the root of its mean square, times weight [K]."""
    wide = x.double() if residual is None else x.double() + residual.double()
    return wide / (wide.square().mean(dim=1, keepdim=True) + epsilon).sqrt() * weight.double()


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Return SiLU of the first half of x [M, 2 K], times the second half."""
    gate, up = x.double().chunk(2, dim=1)
    return gate * torch.sigmoid(gate) * up
