"""The names for vLLM's --quantization, and what each does to a model's layers."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from scalellm_plugins import config
from scalellm_plugins.errors import ConfigError
from scalellm_plugins.kernels import registry

from . import rules

logger = logging.getLogger("vllm.scalellm")  # below "vllm": its handlers and its level

_EXPERTS = "RoutedExperts"
"""vLLM's class for the experts of a layer. By name: its module imports every kernel for them."""


class OnlineConfig(QuantizationConfig):  # type: ignore[misc]
    """What the three methods share: no file of the checkpoint says anything about them."""

    method: rules.Method

    def __init__(self) -> None:
        super().__init__()
        self._options = config.current().quantization
        self._said: set[str] = set()

    @classmethod
    def get_name(cls) -> str:
        """Return the name for --quantization."""
        return cls.method

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes that a model may have."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least CUDA capability: bfloat16 on tensor cores. CPUs are not asked."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no names: the method works on a plain checkpoint."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OnlineConfig:
        """Raise: a checkpoint that names this method was not written by anybody.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"--quantization {cls.method} quantizes a plain 16-bit checkpoint while it loads; this "
            f"checkpoint is quantized already ({config.get('quant_method', 'method unknown')!r}). "
            "Drop --quantization."
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what handles a layer; None, which is vLLM's own way, for all but linear ones.

        Raises:
            ConfigError: a mixture of experts, or no kernels for this device.
        """
        # Here: only the process that makes the model needs layers, 0.7 s of imports.
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.platforms import current_platform

        from .methods import QuantizedHead, QuantizedLinear

        if any(kind.__name__ == _EXPERTS for kind in type(layer).__mro__):
            rules.refuse_experts(self.method, self._options, prefix)
            return None
        device = current_platform.device_type
        if isinstance(layer, ParallelLMHead) and self._options.lm_head_8bit:
            plan = rules.Plan(8, round_rows=self.method == "scalellm_w8a8")
            self._say(prefix, plan)
            self._require_kernels("int8", device)
            return QuantizedHead(plan, self._options)
        if not isinstance(layer, LinearBase):
            return None  # embeddings, lm_head and the KV cache stay as they are
        names = rules.names_of(prefix, self.packed_modules_mapping)
        width = getattr(layer, "input_size_per_partition", layer.input_size)
        height = getattr(layer, "output_size_per_partition", layer.output_size)
        plan = rules.plan(self.method, self._options, names, height, width, device)
        self._say(prefix, plan)
        if plan.bits == 16:
            return UnquantizedLinearMethod()
        self._require_kernels("int4" if plan.bits == 4 else "int8", device)
        return QuantizedLinear(plan, self._options)

    def _require_kernels(self, kind: registry.Kind, device: str) -> None:
        if device != "cpu" and not self._options.gpu:
            raise ConfigError(
                f"--quantization {self.method} on {device!r}: the kernels for GPUs are right in "
                "Triton's interpreter and compile for sm_80, sm_89 and sm_90, but no GPU has run "
                "them yet. To try them: --scalellm.quantization.gpu true; otherwise drop it."
            )
        registry.load_vllm_ops()
        why = registry.missing(kind, device)
        if why:
            instead = "Drop it" if device == "cpu" else "Drop it, or serve on a CPU"
            if kind == "int4" and not registry.missing("int8", device):
                instead = "8 bits work here: --quantization scalellm_int8"
            raise ConfigError(f"--quantization {self.method}: {why}. {instead}.")

    def _say(self, prefix: str, plan: rules.Plan) -> None:
        """Log what becomes of a kind of layer, such as o_proj, at its first."""
        kind = prefix.rpartition(".")[2]
        line = f"{kind} in {plan.bits} bits"
        line += f", groups of {plan.group}" if plan.group else ""
        line += f" ({plan.why})" if plan.why else ""
        if line not in self._said:
            self._said.add(line)
            logger.info("%s: %s", self.method, line)


# Classes with names of their own: vLLM sends them to its workers.


class Int8Config(OnlineConfig):
    """8-bit weights; activations in 8 bits on CPUs with AVX512, in 16 on others and on GPUs."""

    method = "scalellm_int8"


class W8A8Config(OnlineConfig):
    """8-bit weights, and 8-bit activations: on CPUs the same as `Int8Config`."""

    method = "scalellm_w8a8"


class Int4Config(OnlineConfig):
    """4-bit weights in groups; activations as with `Int8Config`."""

    method = "scalellm_int4"


def register() -> None:
    """Give vLLM the names. Idempotent; changes nothing for a server that does not use them."""
    for kind in (Int8Config, W8A8Config, Int4Config):
        register_quantization_config(kind.method)(kind)
