"""A worker knows when its HTTP server is up, and which object it is.

Symptom without it: the supervisor cannot tell a worker that serves from one that is starting, and
a worker cannot retire.
"""

from __future__ import annotations

from typing import Any

from .registry import replace


def apply() -> None:
    """Wrap the server's start; outside a supervised worker nothing changes."""
    from vllm.entrypoints.launchers import launcher

    original = launcher.NoSignalServer.startup

    async def startup(self: Any, *args: Any, **kwargs: Any) -> None:
        from scalellm_plugins.frontends.worker import current

        await original(self, *args, **kwargs)
        worker = current()
        if worker is not None and self.started:
            worker.server_started(self)

    replace(launcher.NoSignalServer, "startup", startup)
