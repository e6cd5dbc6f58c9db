"""vLLM's interface for quantized linear layers, over the kernels.

A layer is created and loaded as vLLM does it without quantization, so that every loader, shard and
fused projection works; then its weight is rounded, packed and freed, one layer after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from scalellm_plugins.config import QuantizationConfig
from scalellm_plugins.kernels import registry

from . import heap, packed, weights
from .rules import Plan


class QuantizedLinear(LinearMethodBase):  # type: ignore[misc]
    """One linear layer in 8 or 4 bits. `before_packing` may still refuse the whole model."""

    plain: Any = UnquantizedLinearMethod
    """vLLM's own way, in which the layer is created and loaded."""

    def __init__(
        self,
        plan: Plan,
        options: QuantizationConfig,
        before_packing: Callable[[], None] = lambda: None,
    ) -> None:
        self._plan = plan
        self._options = options
        self._before_packing = before_packing
        self._plain = self.plain()

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Make `layer.weight` [N, K] in the model's dtype, as without quantization."""
        self._plain.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Round and pack the weight, and let go of it. Again: nothing."""
        self._before_packing()
        weight = layer.weight
        if weight.numel() == 0:
            return
        packed.keep(layer, self._pack(weight.data))
        # LoRA asks the weight for its device and dtype, the loader for the parameter.
        layer.weight = torch.nn.Parameter(weight.data.new_empty(0), requires_grad=False)
        large = weight.device.type == "cpu" and weight.numel() >= heap.SMALLEST
        del weight  # the last reference, unless the embedding has the same
        if large:
            heap.trim()

    def _pack(self, weight: torch.Tensor) -> registry.Kernel:
        if self._plan.bits == 8:
            eight = weights.to_int8(weight)
            return registry.int8(eight.q, eight.scales, weight.dtype, self._plan.round_rows)
        four = weights.to_int4(
            weight,
            self._plan.group,
            symmetric=self._options.zero_point == "symmetric",
            search=self._options.search == "mse",
        )
        return registry.int4(four.q, four.zeros, four.multipliers, four.steps)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return y [..., N] for x [..., K]."""
        return packed.apply(layer, x, bias)


class QuantizedHead(QuantizedLinear):
    """The output layer in 8 bits. Where its weight is the embedding's, that stays as it is."""

    plain = UnquantizedEmbeddingMethod

    def tie_weights(self, layer: torch.nn.Module, embedding: torch.nn.Module) -> torch.nn.Module:
        """Have the layer take the embedding's weight when all are loaded."""
        tied: torch.nn.Module = self._plain.tie_weights(layer, embedding)
        return tied
