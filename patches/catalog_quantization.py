"""The patch that offers our kernels for quantized checkpoints, as data."""

from __future__ import annotations

from .contracts import Target
from .entries import Patch

_WORKER = "vllm.v1.worker.worker_base"

QUANTIZATION_PATCHES: tuple[Patch, ...] = (
    Patch(
        name="checkpoint_kernels_first",
        feature="quantization",
        module="patch_v1_worker_worker_base",
        targets=(
            Target(
                module=_WORKER,
                qualname="WorkerWrapperBase.init_device",
                parameters=(),
                is_async=False,
                reads=("self.vllm_config",),
                calls=("self.worker.init_device",),
            ),
        ),
        why="vLLM's CPU kernel for 4-bit checkpoints is slower than bf16 without AMX, and there is "
        "none for 8-bit weights, nor without AVX512; a plugin can only append to the list of "
        "kernels, whose first one wins",
        how="before a worker starts its device, our kernel comes first in the CPU's list",
        when="process",
        composes=True,
        remove_when="vLLM lets a plugin register a kernel before its own",
    ),
)
