"""A worker's client of the engine adopts its slot's sockets, and what earlier workers learnt.

Symptom without it: a replaced worker waits ten minutes for a ready message that the engine sends
only once, and fails.
"""

from __future__ import annotations

from typing import Any

from .registry import replace


def apply() -> None:
    """Wrap the constructor of vLLM's client; outside a supervised worker nothing changes."""
    from vllm.v1.engine import core_client

    original = core_client.MPClient.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from scalellm_plugins.frontends.supervised_client import adopted_sockets
        from scalellm_plugins.frontends.worker import current

        worker = current()
        if worker is None:
            original(self, *args, **kwargs)
            return
        sockets = (worker.index, worker.listeners, worker.ready)
        with adopted_sockets(core_client, self, *sockets) as payloads:
            original(self, *args, **kwargs)
        worker.engines_ready(self, payloads)

    replace(core_client.MPClient, "__init__", __init__)
