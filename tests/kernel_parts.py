"""How far a product is from the oracle's."""

from __future__ import annotations

import torch

from scalellm_plugins.kernels import reference


def error(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> float:
    """The largest error of y [M, N] as a share of the largest value that is to be expected.

    A number of x halfway between two of 8 bits may be rounded to the other one. Among few results,
    each may be small by chance, and that one step too large a share of it: 1 of 100 single ones.
    """
    rows = reference.quantized_rows(x)
    expected = reference.linear(rows, weight, bias)
    typical = rows.norm(dim=1).max() * weight.norm(dim=1).max() / x.shape[1] ** 0.5
    return float((y.double() - expected).abs().max() / max(expected.abs().max(), typical))
