"""GET /scalellm/features: what is on in this server, and why, for people and for monitoring."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI

from scalellm_plugins import __version__, activation, compat


class StatusEndpoint:
    """An endpoint plugin of vLLM (`vllm.plugins.endpoint_plugins.interface.EndpointPlugin`)."""

    name = "scalellm.status"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the route, unless the feature is off."""
        if activation.is_on("status"):
            app.add_api_route(
                "/scalellm/features",
                features,
                methods=["GET"],
                tags=["scalellm"],
                summary="Features of ScaleLLM plugins: on or off, and why",
            )

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Nothing to keep: the decision was taken before the server started."""


async def features() -> dict[str, Any]:
    """Return versions and the start-up table as JSON."""
    return {
        "scalellm_plugins": __version__,
        "vllm": compat.installed_version(),
        "features": [asdict(state) for state in activation.states()],
    }
