"""Seams of online quantization: what `quantization/` and `kernels/` use of vLLM. Pure data."""

from __future__ import annotations

from .contracts import Target
from .seams import Seam

_QUANTIZATION = "vllm.model_executor.layers.quantization"
_OPS = "vllm._custom_ops"
_LINEAR = "vllm.model_executor.kernels.linear"
_INT8 = "vllm.model_executor.kernels.linear.scaled_mm.cpu"

QUANTIZATION_SEAMS: tuple[Seam, ...] = (
    Seam(
        name="quantization_registry",
        feature="quantization",
        why="a method is registered by name and found by --quantization",
        targets=(
            Target(
                module=_QUANTIZATION,
                qualname="register_quantization_config",
                parameters=("quantization",),
            ),
            Target(
                module=_QUANTIZATION,
                qualname="get_quantization_config",
                parameters=("quantization",),
                reads=("_CUSTOMIZED_METHOD_TO_QUANT_CONFIG",),
            ),
            Target(
                module=f"{_QUANTIZATION}.base_config",
                qualname="QuantizationConfig",
                kind="class",
                implements=(
                    "get_name",
                    "get_supported_act_dtypes",
                    "get_min_capability",
                    "get_config_filenames",
                    "from_config",
                    "get_quant_method",
                ),
            ),
        ),
    ),
    Seam(
        name="linear_method",
        feature="quantization",
        why="weights are loaded as without quantization, then packed, and applied by our kernels",
        targets=(
            Target(
                module="vllm.model_executor.layers.linear",
                qualname="LinearMethodBase",
                kind="class",
                implements=("create_weights", "apply"),
                members=("process_weights_after_loading",),
            ),
            Target(
                module="vllm.model_executor.layers.linear",
                qualname="LinearMethodBase.create_weights",
                parameters=(
                    "layer",
                    "input_size_per_partition",
                    "output_partition_sizes",
                    "input_size",
                    "output_size",
                    "params_dtype",
                ),
            ),
            Target(
                module="vllm.model_executor.layers.linear",
                qualname="LinearMethodBase.apply",
                parameters=("layer", "x", "bias"),
            ),
        ),
    ),
    Seam(
        name="online_loading",
        feature="quantization",
        why="a method without files works on a plain checkpoint, and packs layer after layer",
        targets=(
            Target(
                module="vllm.model_executor.model_loader.weight_utils",
                qualname="get_quant_config",
                calls=("quant_cls.get_config_filenames", "quant_cls"),
            ),
            Target(
                module="vllm.model_executor.model_loader.utils",
                qualname="process_weights_after_loading",
                calls=("quant_method.process_weights_after_loading",),
            ),
            Target(
                module="vllm.model_executor.layers.linear",
                qualname="UnquantizedLinearMethod.create_weights",
                calls=("ModelWeightParameter", "layer.register_parameter"),
            ),
            # The first layer that is packed knows that all have been made: patterns of options
            # that match none of them are refused then.
            Target(
                module="vllm.model_executor.model_loader.base_loader",
                qualname="BaseModelLoader.load_model",
                calls=("self.load_weights", "process_weights_after_loading"),
            ),
            # Where only some of the layers are here, or the model is a draft.
            Target(
                module="vllm.config.vllm",
                qualname="get_current_vllm_config_or_none",
                parameters=(),
            ),
            Target(
                module="vllm.config.vllm",
                qualname="VllmConfig",
                kind="class",
                members=("quant_config", "model_config", "parallel_config", "speculative_config"),
            ),
            Target(
                module="vllm.config.model",
                qualname="ModelConfig",
                kind="class",
                members=("get_total_num_hidden_layers",),
            ),
            Target(
                module="vllm.config.model",
                qualname="ModelConfig.__post_init__",
                assigns=("self.runner_type",),
            ),
            # A mixture of experts is refused by its config.json, before an engine starts.
            Target(
                module="vllm.config.vllm",
                qualname="VllmConfig._get_quantization_config",
                calls=("get_quant_config", "quant_config.maybe_update_config"),
            ),
            Target(
                module=f"{_QUANTIZATION}.base_config",
                qualname="QuantizationConfig.maybe_update_config",
                parameters=("model_name",),
                keywords=("hf_config", "revision"),
            ),
            # Its experts are refused by the name of this class.
            Target(
                module="vllm.model_executor.layers.fused_moe.routed_experts",
                qualname="RoutedExperts",
                kind="class",
            ),
        ),
    ),
    Seam(
        name="checkpoint_kernels",
        feature="quantization",
        why="vLLM takes the first kernel of a list that says it can, and hands it packed weights",
        targets=(
            Target(module=_LINEAR, qualname="_POSSIBLE_KERNELS", kind="attribute"),
            Target(module=_LINEAR, qualname="_POSSIBLE_INT8_KERNELS", kind="attribute"),
            Target(
                module=_LINEAR,
                qualname="init_int8_linear_kernel",
                reads=("_POSSIBLE_INT8_KERNELS",),
                calls=("Int8ScaledMMLinearLayerConfig",),
            ),
            Target(
                module=f"{_LINEAR}.scaled_mm.ScaledMMLinearKernel",
                qualname="Int8ScaledMMLinearKernel._get_layer_params",
                parameters=("layer",),
            ),
            Target(
                module=_LINEAR,
                qualname="choose_mp_linear_kernel",
                reads=("_POSSIBLE_KERNELS", "envs.VLLM_DISABLED_KERNELS"),
                calls=("kernel.can_implement",),
            ),
            Target(
                module=f"{_LINEAR}.mixed_precision",
                qualname="MPLinearKernel",
                kind="class",
                implements=(
                    "get_min_capability",
                    "can_implement",
                    "process_weights_after_loading",
                    "apply_weights",
                ),
            ),
            Target(
                module=f"{_LINEAR}.mixed_precision.cpu",
                qualname="CPUWNA16LinearKernel.process_weights_after_loading",
                reads=(
                    "weights.input_dim",
                    "weights.packed_dim",
                    "scales.output_dim",
                    "zp.output_dim",
                    "envs.VLLM_CPU_INT4_W4A8",
                ),
            ),
        ),
    ),
    Seam(
        name="cpu_ops",
        feature="quantization",
        why="the kernels multiply with vLLM's compiled ops, whose arguments its wrappers show",
        targets=(
            Target(
                module=_OPS,
                qualname="create_onednn_scaled_mm",
                calls=("torch.ops._C.create_onednn_scaled_mm_handler",),
            ),
            Target(
                module=_OPS,
                qualname="onednn_scaled_int8_quant",
                calls=("torch.ops._C.dynamic_scaled_int8_quant",),
            ),
            Target(
                module=_OPS,
                qualname="onednn_scaled_mm",
                calls=("torch.ops._C.onednn_scaled_mm",),
            ),
            Target(
                module=_INT8,
                qualname="CPUInt8ScaledMMLinearKernel.process_weights_for_sgl",
                calls=("torch.ops._C.convert_weight_packed",),
            ),
            Target(
                module=_INT8,
                qualname="CPUInt8ScaledMMLinearKernel._apply_weights_sgl",
                calls=("torch.ops._C.int8_scaled_mm_with_quant",),
            ),
            Target(
                module=_OPS,
                qualname="int4_scaled_mm_cpu",
                parameters=("x", "w", "w_zeros", "w_scales", "bias"),
                calls=("torch.ops._C.int4_scaled_mm_cpu",),
            ),
        ),
    ),
)
