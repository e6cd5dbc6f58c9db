"""A worker is offered our CPU kernel for 4-bit and 8-bit checkpoints before vLLM's own.

Symptom without it: 4-bit checkpoints decode at two thirds of bf16's speed (AVX512), or not at all.
See `scalellm_plugins/quantization/checkpoints.py`.
"""

from __future__ import annotations

from typing import Any

from .registry import replace


def apply() -> None:
    """Before a worker starts its device, put our kernel first."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    init_device = WorkerWrapperBase.init_device

    def offering_init_device(self: Any) -> Any:
        # Only then: a model that is not quantized does without these imports.
        if self.vllm_config.model_config.quantization is not None:
            from scalellm_plugins.quantization import checkpoints

            checkpoints.offer()
        return init_device(self)

    replace(WorkerWrapperBase, "init_device", offering_init_device)
