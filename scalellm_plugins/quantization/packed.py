"""A layer whose weight is packed: what it keeps, and how it is applied."""

from __future__ import annotations

import torch

from scalellm_plugins.kernels import registry


def keep(layer: torch.nn.Module, kernel: registry.Kernel) -> None:
    """Set `layer.kernel`, and `layer.bias_float`: float32 [N], or None."""
    layer.kernel = kernel
    bias = getattr(layer, "bias", None)
    layer.bias_float = None if bias is None else bias.data.float()


def apply(
    layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return y [..., N] for x [..., K], of the model's dtype. A bias is the layer's own."""
    kernel: registry.Kernel = layer.kernel
    offset = None if bias is None else layer.bias_float
    if x.dim() == 2:
        return kernel(x, offset)
    y = kernel(x.reshape(-1, x.shape[-1]), offset)
    return y.view(*x.shape[:-1], kernel.out_features)
