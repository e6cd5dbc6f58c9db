"""A worker's LoRA adapters are those of all workers.

Symptom without it: an adapter that one worker loaded is unknown to the others, and two workers
give the same id to different adapters, so that the engine answers with the wrong one.
"""

from __future__ import annotations

from typing import Any

from .registry import replace


def apply() -> None:
    """Wrap the constructor; outside a supervised worker nothing changes."""
    from vllm.entrypoints.openai.models import serving

    original = serving.OpenAIServingModels.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from scalellm_plugins.frontends import shared_loras
        from scalellm_plugins.frontends.worker import current

        original(self, *args, **kwargs)
        worker = current()
        if worker is not None:
            shared_loras.share(self, worker.slots.state.loras)

    replace(serving.OpenAIServingModels, "__init__", __init__)
