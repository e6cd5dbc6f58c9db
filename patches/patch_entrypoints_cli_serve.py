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

    single = serve.run_server

    def run_server(args: Any, **uvicorn_kwargs: Any) -> Any:
        from scalellm_plugins.frontends.worker import uvicorn_options

        return single(args, **{**uvicorn_options(), **uvicorn_kwargs})

    def manager(**kwargs: Any) -> Any:
        from scalellm_plugins.frontends.supervised import SupervisedServers

        return SupervisedServers(**kwargs)

    replace(serve, "run_server", run_server)
    # run_multi_api_server refuses VLLM_ALLOW_RUNTIME_LORA_UPDATING before it gets here: where
    # runtime LoRA is made right across workers, that check has to be lifted too.
    replace(serve, "APIServerProcessManager", manager)
