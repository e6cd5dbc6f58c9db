"""The engine can abort everything that one API server asked for.

Symptom without it: when a worker dies, its requests run to their end for nobody, and hold their KV
blocks until then.
"""

from __future__ import annotations

from typing import Any

from .registry import add


def apply() -> None:
    """Add the method; clients reach it as a utility call, which looks methods up by name."""
    from vllm.v1.engine import core

    from scalellm_plugins.frontends.supervised_client import ABORT_CLIENT

    def scalellm_abort_client(self: Any, client_index: int) -> int:
        """Abort all requests of an API server; return how many there were."""
        requests = [
            request_id
            for request_id, request in self.scheduler.requests.items()
            if request.client_index == client_index
        ]
        if requests:
            self.abort_requests(requests)
        return len(requests)

    add(core.EngineCore, ABORT_CLIENT, scalellm_abort_client)
