"""What vLLM's entry points call, and nothing else."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """`vllm.general_plugins`: called in every vLLM process."""


def simulated_platform() -> str | None:
    """`vllm.platform_plugins`: the simulated GPU, when it was asked for."""
    import os

    if "scalellm.sim" in os.environ.get("VLLM_PLUGINS", "").split(","):
        return "scalellm_plugins.simulator.platform.SimulatedGpuPlatform"
    return None


def endpoints() -> Any:
    """`vllm.endpoint_plugins`."""
    raise NotImplementedError
