"""The patches that put shared memory between API servers and engines, as data."""

from __future__ import annotations

from .contracts import Target
from .entries import Patch

_CORE = "vllm.v1.engine.core"
_CLIENT = "vllm.v1.engine.core_client"

IPC: tuple[Patch, ...] = (
    Patch(
        name="engine_rings",
        feature="ipc",
        module="patch_v1_engine_core_rings",
        targets=(
            Target(
                module=_CORE,
                qualname="EngineCoreProc.process_input_sockets",
                parameters=("input_addresses", "coord_input_address", "identity", "ready_event"),
                is_async=False,
                reads=("self.input_queue", "self.aborts_queue"),
                calls=(
                    "ready_event.set",
                    "self.preprocess_add_request",
                    "self._handle_mm_cache_miss",
                    "self._handle_request_preproc_error",
                    "self.aborts_queue.put_nowait",
                    "self.input_queue.put_nowait",
                ),
            ),
            Target(
                module=_CORE,
                qualname="EngineCoreProc.process_output_sockets",
                parameters=("output_paths", "coord_output_path", "engine_index"),
                is_async=False,
                reads=("EngineCoreProc.ENGINE_CORE_DEAD",),
                calls=("self.output_queue.get",),
            ),
        ),
        why="per step two threads of the engine and ZMQ's own wake up, and an object per token is "
        "encoded",
        how="when the input thread starts, queues that read and write shared memory take the place "
        "of the engine's; they fall back to them for everybody who is not connected",
        when="engine",
        remove_when="vLLM's engine has a transport that can be chosen, and sends columns",
    ),
    Patch(
        name="client_rings",
        feature="ipc",
        module="patch_v1_engine_core_client_rings",
        targets=(
            Target(
                module=_CLIENT,
                qualname="AsyncMPClient._ensure_output_queue_task",
                assigns=("resources.output_queue_task",),
                reads=("resources.output_socket", "self.decoder"),
            ),
            Target(
                module=_CLIENT,
                qualname="AsyncMPClient._send_input",
                parameters=("request_type", "request", "engine"),
                calls=("self.encoder.encode", "self._send_input_message"),
            ),
            Target(
                module=_CLIENT,
                qualname="AsyncMPClient._send_input_message",
                parameters=("message", "engine"),
                calls=("self.ensure_alive", "self.input_socket.send_multipart"),
            ),
        ),
        why="every message of the engine costs an API server two asyncio tasks, and an object per "
        "token",
        how="what the client sends to connected engines goes by shared memory; its reading task "
        "sees the messages of sockets and shared memory as one stream",
        when="process",
        remove_when="vLLM's client has a transport that can be chosen, and takes columns",
    ),
)
