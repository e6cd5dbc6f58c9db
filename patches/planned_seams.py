"""Seams of features that are not built yet: watched, so that they can be built.

A break of a planned feature's switches nothing off that exists today; `scalellm doctor` reports it,
and fails on it only under `--strict`. Pure data, like `seams.py`.
"""

from __future__ import annotations

from .contracts import Target
from .seams import Seam

_QUANTIZATION = "vllm.model_executor.layers.quantization"

QUANTIZATION = (
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
        why="weights are packed after loading, and applied by our kernels",
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
)

PLANNED: tuple[Seam, ...] = QUANTIZATION
