"""Seams of the shared-memory layer: the messages that it carries, and who else handles them.

Pure data. Its patches are in `catalog_ipc.py`.
"""

from __future__ import annotations

from .contracts import Target
from .seams import Seam

_ENGINE = "vllm.v1.engine"
_CORE = "vllm.v1.engine.core"
_CLIENT = "vllm.v1.engine.core_client"

# Order on the wire: these structs are array-like. Upstream may append, and did.
_OUTPUT_FIELDS = (
    "request_id",
    "new_token_ids",
    "new_logprobs",
    "new_prompt_logprobs_tensors",
    "pooling_output",
    "finish_reason",
    "stop_reason",
    "events",
    "kv_transfer_params",
    "ec_transfer_params",
    "trace_headers",
    "prefill_stats",
    "routed_experts",
    "num_nans_in_logits",
    "mm_cache_miss_hashes",
    "new_sampling_mask",
    "spec_decode_metrics",
)
_OUTPUTS_FIELDS = (
    "engine_index",
    "outputs",
    "scheduler_stats",
    "timestamp",
    "utility_output",
    "finished_requests",
    "wave_complete",
    "start_wave",
)
_REQUEST_FIELDS = (
    "request_id",
    "prompt_token_ids",
    "mm_features",
    "sampling_params",
    "pooling_params",
    "arrival_time",
    "lora_request",
    "cache_salt",
    "data_parallel_rank",
    "prompt_embeds",
    "prompt_is_token_ids",
    "client_index",
    "current_wave",
    "priority",
    "trace_headers",
    "resumable",
    "external_req_id",
    "reasoning_ended",
    "reasoning_parser_kwargs",
    "abort_immediately",
    "session_id",
)


def _struct(name: str, fields: tuple[str, ...], vllm: str = "") -> Target:
    return Target(module=_ENGINE, qualname=name, kind="class", fields=fields, vllm=vllm)


IPC_SEAMS = (
    Seam(
        name="engine_messages",
        feature="ipc",
        why="columns replace these structs on the wire, and the rest still travels as them",
        targets=(
            _struct("EngineCoreOutput", _OUTPUT_FIELDS),
            _struct(
                "EngineCoreOutput", (*_OUTPUT_FIELDS, "prompt_token_id_logprobs"), vllm=">=0.31"
            ),
            _struct(
                "EngineCoreOutput",
                (*_OUTPUT_FIELDS, "prompt_token_id_logprobs", "error"),
                vllm=">=0.33",
            ),
            _struct("EngineCoreOutputs", _OUTPUTS_FIELDS),
            _struct("EngineCoreOutputs", (*_OUTPUTS_FIELDS, "weight_version"), vllm=">=0.32"),
            _struct("EngineCoreRequest", _REQUEST_FIELDS),
            _struct("EngineCoreRequest", (*_REQUEST_FIELDS, "kv_hints"), vllm=">=0.31"),
        ),
    ),
    Seam(
        name="engine_loop",
        feature="ipc",
        why="ours stand in the place of the queues: this is all that is done with them",
        targets=(
            Target(
                module=_CORE,
                qualname="EngineCoreProc._process_input_queue",
                calls=("self.input_queue.get", "self.input_queue.empty"),
            ),
            Target(
                module=_CORE,
                qualname="EngineCoreProc._process_engine_step",
                calls=("self.output_queue.put_nowait",),
            ),
            # Plugins load inside super().__init__, hence before the threads look the methods up.
            Target(
                module=_CORE,
                qualname="EngineCoreProc.__init__",
                assigns=("self.input_queue", "self.output_queue", "self.addresses"),
                reads=("self.process_input_sockets", "self.process_output_sockets"),
                calls=("super().__init__", "threading.Thread", "ready_event.wait"),
            ),
            Target(
                module=_CORE,
                qualname="EngineCore.preprocess_add_request",
                parameters=("request",),
                is_async=False,
            ),
            Target(
                module=_CORE,
                qualname="EngineCoreProc._handle_mm_cache_miss",
                parameters=("request", "err"),
            ),
            Target(
                module=_CORE,
                qualname="EngineCoreProc._handle_request_preproc_error",
                parameters=("request",),
            ),
            Target(
                module=_CORE,
                qualname="EngineCore._process_aborts_queue",
                calls=("self.aborts_queue.empty", "self.aborts_queue.get_nowait"),
            ),
        ),
    ),
)
