"""The names for vLLM's --quantization, and what each does to a model's layers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from scalellm_plugins import config
from scalellm_plugins.errors import ConfigError
from scalellm_plugins.kernels import registry

from . import asked, rules, unmatched

logger = logging.getLogger("vllm.scalellm")  # below "vllm": its handlers and its level

_EXPERTS = "RoutedExperts"
"""vLLM's class for the experts of a layer. By name: its module imports every kernel for them."""


@dataclass(frozen=True)
class _Place:
    """Which part of which model this process makes with a config.

    `layers`: of the whole model, where this process makes only some of them.
    """

    layers: int = 0
    why_partial: str = ""
    is_draft: bool = False

    @classmethod
    def here(cls, made_for: QuantizationConfig) -> _Place:
        """Ask vLLM, while it makes a model."""
        from vllm.config import get_current_vllm_config_or_none

        current = get_current_vllm_config_or_none()
        model = current and current.model_config
        if model is None:  # a layer by itself
            return cls()
        if current.quant_config is not made_for or model.runner_type == "draft":
            return cls(is_draft=True)
        if current.parallel_config.pipeline_parallel_size > 1:
            why = "this stage of the pipeline has some of the layers only; others may have such"
            return cls(model.get_total_num_hidden_layers(), why)
        if current.speculative_config is not None:
            return cls(why_partial="the draft's layers, not made yet, may have such names")
        return cls()


class OnlineConfig(QuantizationConfig):  # type: ignore[misc]
    """What the three methods share: no file of the checkpoint says anything about them."""

    method: asked.Method

    def __init__(self) -> None:
        super().__init__()
        self._options = config.current().quantization
        self._said: set[str] = set()
        self._seen = unmatched.Seen()
        self._place: _Place | None = None
        self._checked = False
        self._has_experts = False
        # From Python, and for a draft; vLLM's command line was refused already.
        if why := asked.without_effect([self.method], config.raw_from_env()):
            logger.warning("%s", why)

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

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Look at the model's config.json, which vLLM has read before it starts an engine.

        Raises:
            ConfigError: a mixture of experts that no pattern of `skip` can mean.
        """
        del revision
        self._has_experts = asked.has_experts(hf_config)
        if self._has_experts:
            rules.refuse_experts_early(self.method, self._options, model_name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what handles a layer; None, which is vLLM's own way, for all but linear ones.

        Raises:
            ConfigError: a mixture of experts, or no kernels for this device.
        """
        # Here: only the process that makes the model needs layers, 0.7 s of imports.
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )
        from vllm.platforms import current_platform

        from .methods import QuantizedHead, QuantizedLinear

        if self._place is None:
            self._place = _Place.here(self)
        experts = any(kind.__name__ == _EXPERTS for kind in type(layer).__mro__)
        if experts or isinstance(layer, VocabParallelEmbedding):
            self._seen.add([prefix], linear=False)
        if experts:
            rules.refuse_experts(self.method, self._options, prefix)
            return None
        device = current_platform.device_type
        if isinstance(layer, ParallelLMHead) and self._options.lm_head_8bit:
            plan = rules.head_plan(self.method, self._options, prefix)
            self._say(prefix, plan)
            if plan.bits == 16:
                return None
            self._require_kernels("int8", device)
            return QuantizedHead(plan, self._options, self.model_is_made)
        if not isinstance(layer, LinearBase):
            return None  # embeddings, lm_head and the KV cache stay as they are
        names = rules.names_of(prefix, self.packed_modules_mapping)
        self._seen.add(names, linear=True)
        width = getattr(layer, "input_size_per_partition", layer.input_size)
        height = getattr(layer, "output_size_per_partition", layer.output_size)
        plan = rules.plan(self.method, self._options, names, height, width, device)
        self._say(prefix, plan)
        if plan.bits == 16:
            return UnquantizedLinearMethod()
        self._require_kernels("int4" if plan.bits == 4 else "int8", device)
        return QuantizedLinear(plan, self._options, self.model_is_made)

    def model_is_made(self) -> None:
        """Hold the patterns against the layers that were asked about; once.

        Called by every layer that is about to be packed: vLLM loads no weight before the whole
        model exists, and packs none before all are loaded.

        Raises:
            ConfigError: a pattern matches none of them.
        """
        place = self._place or _Place()
        if self._checked or place.is_draft:  # the patterns are for the model that it drafts for
            return
        self._checked = True
        options = self._options
        if self.method != "scalellm_int4":
            options = msgspec.structs.replace(options, keep_8bit=None)  # said already
        # The pattern that `refuse_experts_early` asks for may stand, whatever layers there are.
        experts = ["layers.0.experts"] if self._has_experts else []
        texts = unmatched.unmatched(options, self._seen, layers=place.layers, others=experts)
        if texts and not place.why_partial:
            raise ConfigError(" ".join(texts))
        for text in texts:
            logger.warning("%s (%s)", text, place.why_partial)

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
    """8-bit weights; activations in 8 bits on CPUs, in 16 on GPUs."""

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
