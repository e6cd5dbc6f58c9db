"""Quantized checkpoints on CPUs: our kernels in the place of vLLM's for weights of 4 and 8 bits.

compressed-tensors (pack-quantized), GPTQ and AWQ all ask one list of vLLM for a kernel for "mixed
precision": integer weights, 16-bit rows. vLLM's own for CPUs multiplies such rows by weights that
it unpacks anew for every row; ours rounds rows to 8 bits, as vLLM's does where there is AMX, and as
`--quantization scalellm_int4` does. 8-bit weights in groups are rounded anew, to a scale per
channel: as exact as `--quantization scalellm_int8` is. For W8A8, whose rows are rounded anyway,
there is another list.

They decline, and vLLM's own are taken, where weights have no shape for them, where there is AMX
(vLLM's use its matrix units), and where VLLM_CPU_INT4_W4A8=0 asks for rows of 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import envs
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mixed_precision import MPLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm import Int8ScaledMMLinearKernel
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from scalellm_plugins import config
from scalellm_plugins.kernels import registry

from . import heap, packed, weights

_MIDDLE = 8
"""The zero of 4-bit weights without one."""


_DTYPES = (torch.bfloat16, torch.float16)
_AMX = "vLLM's own uses AMX"


def offer() -> None:
    """Put the kernels first in the lists for CPUs, unless an option says no. Idempotent."""
    if not config.current().quantization.checkpoints:
        return
    for lists, kernel in (
        (linear._POSSIBLE_KERNELS, ScaleLLMLinearKernel),
        (linear._POSSIBLE_INT8_KERNELS, ScaleLLMInt8LinearKernel),
    ):
        listed = lists[PlatformEnum.CPU]
        if kernel not in listed:
            listed.insert(0, kernel)


def _keep(layer: torch.nn.Module, kernel: registry.Kernel, *parameters: Any) -> None:
    """Have the layer keep its kernel, and let go of the checkpoint's parameters."""
    packed.keep(layer, kernel)
    large = any(parameter.data.nbytes >= heap.SMALLEST for parameter in parameters)
    for parameter in parameters:  # the names stay: LoRA asks them for their device
        parameter.data = parameter.data.new_empty(0)
    if large:
        heap.trim()


class ScaleLLMLinearKernel(MPLinearKernel):  # type: ignore[misc]
    """A linear layer with integer weights. Its name is what VLLM_DISABLED_KERNELS takes."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Return no capability: it is for CPUs."""
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        """Return whether weights of this kind are multiplied here, and why not."""
        why = _refusal(c)
        return why is None, why

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the weight, and let go of the checkpoint's. Again: nothing."""
        weight = getattr(layer, self.w_q_name)
        if weight.numel() == 0:
            return
        scales, zeros = getattr(layer, self.w_s_name), None
        if self.config.zero_points:
            zeros = getattr(layer, self.w_zp_name or "")
        elif self.w_zp_name and getattr(layer, self.w_zp_name, None) is not None:
            setattr(layer, self.w_zp_name, None)  # GPTQ's are loaded, and mean nothing
        kept = (weight, scales) if zeros is None else (weight, scales, zeros)
        _keep(layer, self._pack(weight, scales, zeros), *kept)

    def _pack(self, weight: Any, scales: Any, zeros: Any) -> registry.Kernel:
        """Return the kernel of vLLM's parameters."""
        scale = scales.data if scales.output_dim == 0 else scales.data.t()
        scale = scale.to(self.config.act_type).contiguous()
        if self.config.weight_type == scalar_types.uint8b128:
            q = (_bytes(weight) ^ 0x80).view(torch.int8)
            if scale.shape[1] == 1:
                return registry.int8(q, scale[:, 0].float(), self.config.act_type)
            grouped = q.view(*scale.shape, -1).to(scale.dtype).mul_(scale[:, :, None])
            eight = weights.to_int8(grouped.view(q.shape))
            return registry.int8(eight.q, eight.scales, self.config.act_type)
        if zeros is None:
            zero = torch.full(scale.shape, _MIDDLE, dtype=torch.int8)
        else:
            zero = _nibbles(zeros).t().contiguous().view(torch.int8)
        return registry.int4_scaled(_nibbles(weight), zero, scale)

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return y [..., N] for x [..., K]."""
        return packed.apply(layer, x, bias)


class ScaleLLMInt8LinearKernel(Int8ScaledMMLinearKernel):  # type: ignore[misc]
    """A linear layer of W8A8: rows are rounded as they come, weights have a scale per channel."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Return whether this processor has kernels."""
        del compute_capability
        why = _AMX if torch.cpu._is_amx_tile_supported() else registry.missing("int8")
        return not why, why or None

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        """Return whether weights of this kind are multiplied here, and why not."""
        if not c.is_channelwise or c.is_static_input_scheme or not c.input_symmetric:
            return False, "a scale per tensor, or rows whose scale or zero was set before"
        dtype = torch.get_default_dtype()  # the model's, while it is made
        return dtype in _DTYPES, f"rows of {dtype}"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the weight, and let go of the checkpoint's. Again: nothing."""
        weight, scales, *_ = self._get_layer_params(layer)
        if weight.numel():
            scale = scales.data.view(-1).float()
            kernel = registry.int8(weight.data, scale, torch.get_default_dtype())
            _keep(layer, kernel, weight, scales)

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return y [..., N] for x [..., K]."""
        return packed.apply(layer, x, bias)


def _refusal(c: Any) -> str | None:
    """Return why a layer is left to vLLM's kernels."""
    width, channels = c.partition_weight_shape
    group = width if c.group_size == -1 else c.group_size
    if torch.cpu._is_amx_tile_supported():
        return _AMX
    if not envs.VLLM_CPU_INT4_W4A8:
        return "VLLM_CPU_INT4_W4A8=0 asks for rows of 16 bits"
    if getattr(c, "has_g_idx", False):
        return "weights in an order of their own (act-order)"
    if c.act_type not in _DTYPES or c.out_type not in (None, c.act_type):
        return f"rows of {c.act_type}, results of {c.out_type}"
    if c.weight_type == scalar_types.uint8b128:
        if width % group:
            return f"groups of {group} of {width} inputs"
        return registry.missing("int8") or None
    if c.weight_type != (scalar_types.uint4 if c.zero_points else scalar_types.uint4b8):
        return f"weights of type {c.weight_type}"
    if not registry.fits("int4", channels, width, group):
        return f"groups of {group} of {width} inputs"
    return registry.missing("int4") or None


def _bytes(parameter: Any) -> torch.Tensor:
    """Return a parameter packed in 32-bit words as uint8 [other dimension, bytes], in order."""
    words = parameter.data if parameter.packed_dim == 1 else parameter.data.t()
    return words.contiguous().view(torch.uint8)


def _nibbles(parameter: Any) -> torch.Tensor:
    """Return its 4-bit numbers, uint8 [other dimension, numbers]: the lower ones come first."""
    pairs = _bytes(parameter)
    return torch.stack([pairs & 15, pairs >> 4], dim=2).view(len(pairs), -1)
