"""`vllm serve` starts our worker processes in place of vLLM's.

Symptom without it: `--scalellm.frontend.workers 2` starts two of vLLM's API servers, each with ten
seconds of imports; when one dies, the whole server ends.
"""

from __future__ import annotations

from typing import Any

from .registry import replace


def apply() -> None:
    """Put our process manager, and our connections, where `vllm serve` looks vLLM's up."""
    from vllm.entrypoints.cli import serve

    single, several = serve.run_server, serve.run_multi_api_server

    def run_server(args: Any, **uvicorn_kwargs: Any) -> Any:
        from scalellm_plugins.frontends.worker import uvicorn_options

        return single(args, **{**uvicorn_options(), **uvicorn_kwargs})

    def run_multi_api_server(args: Any) -> Any:
        # It refuses runtime LoRA updates, which are right across our workers. What it asks is this
        # module's own name for vLLM's settings; everybody else has theirs.
        real = serve.envs
        serve.envs = _WithoutLoraUpdates(real)
        try:
            return several(args)
        finally:
            serve.envs = real

    def manager(**kwargs: Any) -> Any:
        from scalellm_plugins.frontends.supervised import SupervisedServers

        return SupervisedServers(**kwargs)

    replace(serve, "run_server", run_server)
    replace(serve, "run_multi_api_server", run_multi_api_server)
    replace(serve, "APIServerProcessManager", manager)


class _WithoutLoraUpdates:
    """vLLM's settings, one of them off."""

    VLLM_ALLOW_RUNTIME_LORA_UPDATING = False

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
