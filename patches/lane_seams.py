"""Seams of the fast lane: what it calls of vLLM's request path, and what calls it. Pure data."""

from __future__ import annotations

from .contracts import Target
from .seams import Seam

_CHAT = "vllm.entrypoints.openai.chat_completion"
_COMPLETION = "vllm.entrypoints.openai.completion"
_OUTPUT = "vllm.v1.engine.output_processor"
_INPUT = "vllm.v1.engine.input_processor"
_LLM = "vllm.v1.engine.async_llm"
_CLIENT = "vllm.v1.engine.core_client"
_STATS = "vllm.v1.metrics.stats"

FAST_LANE = (
    Seam(
        name="answers",
        feature="frontend",
        why="the lane's templates are what these functions write for a made-up result",
        targets=(
            Target(
                module=f"{_CHAT}.serving",
                qualname="OpenAIServingChat.chat_completion_stream_generator",
                parameters=(
                    "request",
                    "result_generator",
                    "request_id",
                    "model_name",
                    "conversation",
                    "tokenizer",
                    "request_metadata",
                ),
                is_async=True,
            ),
            Target(
                module=f"{_CHAT}.serving",
                qualname="OpenAIServingChat.chat_completion_full_generator",
                parameters=(
                    "request",
                    "result_generator",
                    "request_id",
                    "model_name",
                    "conversation",
                    "tokenizer",
                    "request_metadata",
                ),
                is_async=True,
            ),
            Target(
                module=f"{_COMPLETION}.serving",
                qualname="OpenAIServingCompletion.completion_stream_generator",
                parameters=(
                    "request",
                    "engine_inputs",
                    "result_generator",
                    "request_id",
                    "created_time",
                    "model_name",
                    "num_prompts",
                    "tokenizer",
                    "request_metadata",
                ),
                is_async=True,
            ),
            Target(
                module=f"{_COMPLETION}.serving",
                qualname="OpenAIServingCompletion.request_output_to_completion_response",
                parameters=(
                    "final_res_batch",
                    "request",
                    "request_id",
                    "created_time",
                    "model_name",
                    "tokenizer",
                    "request_metadata",
                ),
            ),
        ),
    ),
    Seam(
        name="parameters",
        feature="frontend",
        why="sampling parameters are made by the request classes' own method",
        targets=tuple(
            Target(
                module=f"{module}.protocol",
                qualname=f"{name}.to_sampling_params",
                parameters=("max_tokens", "default_sampling_params"),
                calls=("SamplingParams.from_optional",),
            )
            for module, name in (
                (_CHAT, "ChatCompletionRequest"),
                (_COMPLETION, "CompletionRequest"),
            )
        ),
    ),
    Seam(
        name="requests",
        feature="frontend",
        why="requests of the lane are checked and made by vLLM's input processor",
        targets=(
            Target(
                module=_INPUT,
                qualname="InputProcessor.process_inputs",
                parameters=("request_id", "prompt", "params", "supported_tasks"),
                keywords=("arrival_time", "priority", "session_id"),
                is_async=False,
            ),
            Target(
                module=_INPUT,
                qualname="InputProcessor.assign_request_id",
                parameters=("request",),
                binding="staticmethod",
                assigns=("request.external_req_id", "request.request_id"),
            ),
            Target(
                module=_LLM,
                qualname="AsyncLLM.check_admission",
                is_async=False,
            ),
        ),
    ),
    Seam(
        name="outputs",
        feature="frontend",
        why="the lane's answers stand among vLLM's request states, and its functions count them",
        targets=(
            Target(
                module=_OUTPUT,
                qualname="OutputProcessor.process_outputs",
                parameters=("engine_core_outputs", "engine_core_timestamp", "iteration_stats"),
                is_async=False,
                reads=("self.request_states",),
            ),
            Target(
                module=_OUTPUT,
                qualname="OutputProcessor.abort_requests",
                parameters=("request_ids", "internal"),
                calls=("req_state.make_request_output", "req_state.queue.put"),
            ),
            Target(
                module=_OUTPUT,
                qualname="OutputProcessor.propagate_error",
                parameters=("e",),
                calls=("state.queue.put",),
            ),
            Target(
                module=_OUTPUT,
                qualname="OutputProcessor._finish_request",
                parameters=("req_state",),
                reads=("self.request_states", "self.external_req_ids"),
            ),
            Target(
                module=_OUTPUT,
                qualname="OutputProcessor._update_stats_from_output",
                parameters=(
                    "req_state",
                    "engine_core_output",
                    "engine_core_timestamp",
                    "iteration_stats",
                ),
            ),
            Target(
                module=_OUTPUT,
                qualname="OutputProcessor._update_stats_from_finished",
                parameters=("req_state", "finish_reason", "iteration_stats"),
            ),
            Target(
                module=_STATS,
                qualname="IterationStats.update_from_events",
                parameters=(
                    "req_id",
                    "events",
                    "is_prefilling",
                    "req_stats",
                    "lora_states",
                    "lora_name",
                ),
            ),
        ),
    ),
    Seam(
        name="aborts",
        feature="frontend",
        why="before vLLM ends a request on the frontend's side, the engine is asked what it keeps",
        targets=(
            Target(
                module=_LLM,
                qualname="AsyncLLM.abort",
                parameters=("request_id", "internal"),
                is_async=True,
                calls=("self.output_processor.abort_requests",),
            ),
            Target(
                module=_CLIENT,
                qualname="AsyncMPClient._call_utility_async",
                keywords=("method", "engine"),
                is_async=True,
            ),
        ),
    ),
    Seam(
        name="link",
        feature="frontend",
        why="messages are read in the descriptor's callback instead of these two tasks",
        targets=(
            Target(
                module=_CLIENT,
                qualname="AsyncMPClient._ensure_output_queue_task",
                assigns=("resources.output_queue_task",),
                reads=("resources.output_socket", "self.decoder", "self.utility_results"),
            ),
            Target(
                module=_CLIENT,
                qualname="AsyncMPClient.add_request_async",
                parameters=("request",),
                is_async=True,
                assigns=("request.client_index",),
                calls=("self._send_input",),
            ),
            Target(
                module=_CLIENT,
                qualname="AsyncMPClient._send_input",
                parameters=("request_type", "request", "engine"),
                calls=("self.encoder.encode", "self._send_input_message"),
            ),
            Target(
                module=_CLIENT,
                qualname="_process_utility_output",
                parameters=("output", "utility_results"),
            ),
            Target(
                module=_LLM,
                qualname="AsyncLLM._run_output_handler",
                assigns=("self.output_handler", "self._logger_ref"),
                calls=("output_processor.process_outputs",),
            ),
        ),
    ),
    Seam(
        name="gate",
        feature="frontend",
        why="limits count the full lane's prompts and tenants' keys are added to vLLM's",
        targets=(
            Target(
                module=_LLM,
                qualname="AsyncLLM.generate",
                parameters=("prompt", "sampling_params", "request_id"),
                calls=("self.add_request",),
            ),
            Target(
                module=_LLM,
                qualname="AsyncLLM.encode",
                parameters=("prompt", "pooling_params", "request_id"),
            ),
            Target(
                module=_OUTPUT,
                qualname="OutputProcessor.add_request",
                parameters=("request", "prompt", "parent_req", "request_index", "queue"),
                is_async=False,
            ),
            Target(
                module="vllm.entrypoints.serve.middleware.authenticate",
                qualname="AuthenticationMiddleware.__init__",
                parameters=("app", "tokens"),
                assigns=("self.api_tokens",),
            ),
            Target(
                module="vllm.entrypoints.serve.middleware.authenticate",
                qualname="AuthenticationMiddleware.verify_token",
                parameters=("headers",),
            ),
        ),
    ),
    Seam(
        name="engine_refusals",
        feature="frontend",
        why="what the engine refuses is an exception of both kinds: with a status, without a trace",
        targets=(
            Target(
                module="vllm.exceptions",
                qualname="GracefulHTTPError.__init__",
                parameters=("message", "http_status"),
                assigns=("self.http_status",),
            ),
            Target(
                module="vllm.exceptions",
                qualname="GenerationError.__init__",
                parameters=("message",),
                assigns=("self.status_code",),
            ),
            Target(
                module="vllm.entrypoints.generate.base.serving",
                qualname="GenerateBaseServing._convert_generation_error_to_streaming_response",
                parameters=("e",),
                calls=("self.create_streaming_error_response",),
            ),
        ),
    ),
    Seam(
        name="client_errors",
        feature="frontend",
        why="bad requests that vLLM answers with 500, or not at all, get 400 and are forgotten",
        targets=(
            Target(
                module="vllm.entrypoints.serve.exception_handling.register",
                qualname="init_exception_handler",
                parameters=("app",),
                is_async=False,
            ),
            Target(
                module=_LLM,
                qualname="AsyncLLM.add_request",
                parameters=("request_id", "prompt", "params"),
                is_async=True,
                calls=("self._add_request",),
            ),
            Target(
                module=_LLM,
                qualname="AsyncLLM._add_request",
                parameters=("request", "prompt", "parent_req", "index", "queue"),
                is_async=True,
                calls=("self.output_processor.add_request", "self.engine_core.add_request_async"),
            ),
            Target(
                module="vllm.entrypoints.openai.responses.serving",
                qualname="OpenAIServingResponses.create_responses",
                parameters=("request", "raw_request"),
                is_async=True,
            ),
            Target(
                module="vllm.entrypoints.openai.responses.api_router",
                qualname="_convert_stream_to_sse_events",
                parameters=("generator",),
                calls=("event.model_dump_json",),
            ),
        ),
    ),
)
