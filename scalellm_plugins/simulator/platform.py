"""A vLLM platform that stands for a GPU which is not there.

Derived from `Platform` and not from vLLM's CPU platform: that one forces a worker process and
synchronous scheduling, preloads OpenMP and halves the batch sizes, and a timeline measured behind
all that would be a CPU server's. What a CUDA server would decide is decided here the same way:
asynchronous scheduling, 16-token blocks, batch sizes by the card. One difference is left:
without Triton vLLM schedules for its first model runner instead of the second (the executor takes
either);
that costs the scheduler one set of request ids per step.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.logger import init_logger
from vllm.platforms.interface import Platform, PlatformEnum

from .options import sim_config
from .roofline import gpu_preset

logger = init_logger(__name__)

EXECUTOR = "scalellm_plugins.simulator.executor.SimulatedExecutor"


class SimulatedGpuPlatform(Platform):  # type: ignore[misc]
    """Tensors, where vLLM makes any, live on the CPU; the device's figures are the preset's."""

    _enum = PlatformEnum.OOT
    device_name = "simulated GPU"
    device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"

    shut_down: ClassVar[bool] = False
    """Set by the executor when it shuts down; see `is_cpu`."""

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:  # noqa: ARG003
        """For example "h200 (simulated)"; vLLM looks for "a100" in it to choose batch sizes."""
        return f"{sim_config().gpu} (simulated)"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:  # noqa: ARG003
        """Bytes of the preset card. vLLM chooses its default batch sizes by it."""
        return gpu_preset(sim_config().gpu).memory_bytes

    @classmethod
    def get_current_memory_usage(cls, device: Any = None) -> float:  # noqa: ARG003
        """Bytes used: none."""
        return 0.0

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:  # noqa: ARG003
        """Some kernels' configuration asks; none is ever launched."""
        return 1

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """There is none to set."""

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        """There is no generator: tokens are deterministic."""

    @classmethod
    def inference_mode(cls) -> Any:
        """As on other CPUs."""
        return torch.no_grad()

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        """Pinning needs a driver."""
        return False

    @classmethod
    def import_kernels(cls) -> None:
        """None are needed, and a wheel built for a GPU could not load its own here."""

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        """As on CUDA."""
        return True

    def is_cpu(self) -> bool:
        """False, so that batch sizes are a GPU's; True once the executor has shut down.

        vLLM's last clean-up empties an accelerator's caches unless the platform is a CPU, and torch
        raises where there is no accelerator.
        """
        return self.shut_down

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:  # noqa: ARG003
        """A new engine is being configured, perhaps after another one in this process."""
        cls.shut_down = False

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: Any) -> None:
        """Nothing to compile and no graph to capture."""
        if vllm_config.model_config is not None:
            vllm_config.model_config.enforce_eager = True

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Put the simulated executor in, in EngineCore's own process.

        Raises:
            ConfigError: the configuration asks for what cannot be simulated.
        """
        from vllm.config import CompilationMode, CUDAGraphMode

        from .executor import refuse

        refuse(vllm_config)
        vllm_config.parallel_config.distributed_executor_backend = EXECUTOR
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = "vllm.v1.worker.worker_base.WorkerBase"
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        vllm_config.compilation_config.cudagraph_capture_sizes = []
        blocks = sim_config().kv_blocks
        if blocks is not None:
            vllm_config.cache_config.num_gpu_blocks_override = blocks

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any) -> None:  # noqa: ARG003
        """Refuse what would need a real prompt pass.

        Raises:
            VLLMValidationError: names the parameter. vLLM's own type, since its server answers 400
                to that one and 500 without a text to others.
        """
        from vllm.exceptions import VLLMValidationError

        if getattr(params, "prompt_logprobs", None) is not None:
            raise VLLMValidationError(
                "The simulated GPU has no logits of a prompt; leave prompt_logprobs out",
                parameter="prompt_logprobs",
                value=params.prompt_logprobs,
            )
