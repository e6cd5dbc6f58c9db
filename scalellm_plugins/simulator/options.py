"""Which GPU and model are simulated: `scalellm.sim`'s options, resolved to presets. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from scalellm_plugins import config
from scalellm_plugins.config import SimConfig

from .roofline import Roofline, gpu_preset, model_preset


@dataclass(frozen=True)
class Simulation:
    """What is simulated, resolved."""

    roofline: Roofline
    speed: float
    """How much faster than the card the clock runs."""
    kv_blocks: int | None
    """KV cache blocks, when they do not come from the card's memory."""

    @property
    def summary(self) -> str:
        """For example "8b on 1 × h200"."""
        model, gpu = self.roofline.model, self.roofline.gpu
        return f"{model.name} on {model.tensor_parallel} × {gpu.name}"


def sim_config() -> SimConfig:
    """The options of this process, from the environment that the command line was put into."""
    return config.current().sim


def simulation(options: SimConfig, tensor_parallel_size: int = 1) -> Simulation:
    """Resolve `options`; vLLM's own `--tensor-parallel-size` counts where they leave cards unset.

    Raises:
        ConfigError: an unknown preset, or one that cannot be split among so many cards.
    """
    cards = options.tensor_parallel
    if cards is None and tensor_parallel_size > 1:
        cards = tensor_parallel_size
    roofline = Roofline(gpu_preset(options.gpu), model_preset(options.model, cards))
    return Simulation(roofline, options.speed, options.kv_blocks)
