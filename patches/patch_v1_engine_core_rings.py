"""Engines talk to API servers by shared memory (`scalellm_plugins/engine/rings.py`).

Symptom without it: per decode step two threads and ZMQ's own wake up, on either side.
"""

from __future__ import annotations

import logging
from typing import Any

from .registry import replace

logger = logging.getLogger("vllm.scalellm")


def apply() -> None:
    """Put our queues in the place of vLLM's, just before its input thread says "ready"."""
    from vllm.v1.engine import core

    from scalellm_plugins.engine.rings import Rings

    engine = core.EngineCoreProc
    original = engine.process_input_sockets

    def process_input_sockets(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            Rings(self, self.addresses.outputs).install()
        except Exception:
            logger.exception("ipc: by vLLM's sockets, not shared memory")
        return original(self, *args, **kwargs)

    replace(engine, "process_input_sockets", process_input_sockets)
