"""Seams: what makes the workers' common state right and is vLLM's as it is. Pure data."""

from __future__ import annotations

from .contracts import Target
from .seams import Seam

_RESPONSES = "vllm.entrypoints.openai.responses.serving"
_CLIENT = "vllm.v1.engine.async_llm"
_OUTPUT = "vllm.v1.engine.output_processor"

WORKERS: tuple[Seam, ...] = (
    Seam(
        name="responses_store",
        feature="frontend",
        why="a response is known to every worker: stores and three methods are wrapped",
        targets=(
            Target(
                module=_RESPONSES,
                qualname="OpenAIServingResponses.__init__",
                assigns=("self.enable_store", "self.response_store", "self.msg_store"),
            ),
            Target(
                module=_RESPONSES,
                qualname="OpenAIServingResponses.create_responses",
                parameters=("request", "raw_request"),
                is_async=True,
            ),
            Target(
                module=_RESPONSES,
                qualname="OpenAIServingResponses.retrieve_responses",
                parameters=("response_id", "starting_after", "stream"),
                is_async=True,
                calls=("self.response_store.get", "self.responses_background_stream_generator"),
            ),
            Target(
                module=_RESPONSES,
                qualname="OpenAIServingResponses.cancel_responses",
                parameters=("response_id",),
                is_async=True,
                calls=("self.response_store.get", "self.background_tasks.get"),
            ),
        ),
    ),
    Seam(
        name="queue_limits",
        feature="frontend",
        why="limits on what is queued hold over all workers: check and counting are wrapped",
        targets=(
            Target(
                module=_CLIENT,
                qualname="AsyncLLM.check_admission",
                parameters=("n", "request_id"),
                is_async=False,
                calls=("self.get_num_unfinished_requests", "self.get_num_queued_tokens"),
            ),
            Target(
                module=_OUTPUT,
                qualname="OutputProcessor.__init__",
                assigns=("self.request_states",),
            ),
            Target(
                module=_OUTPUT,
                qualname="OutputProcessor.add_request",
                is_async=False,
                reads=("self.request_states",),
            ),
            Target(module="vllm.exceptions", qualname="MaxQueuedTokensError", kind="class"),
        ),
    ),
    Seam(
        name="server_load",
        feature="frontend",
        why="`/load` is of all workers, the fast lane's requests included",
        targets=(
            Target(
                module="vllm.entrypoints.serve.utils.api_utils",
                qualname="decrement_server_load",
                parameters=("request",),
                assigns=("request.app.state.server_load_metrics",),
            ),
        ),
    ),
    Seam(
        name="metrics_route",
        feature="frontend",
        why="`/metrics` is of all workers: vLLM's route and mount are replaced",
        targets=(
            Target(
                module="vllm.entrypoints.serve.instrumentator.metrics",
                qualname="attach_router",
                parameters=("app",),
                calls=("make_asgi_app", "Mount", "app.routes.append"),
            ),
        ),
    ),
)
