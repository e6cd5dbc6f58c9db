"""The patches, as data: what each changes, why, for which releases, when, and when it can go."""

from __future__ import annotations

from .catalog_ipc import IPC
from .catalog_quantization import QUANTIZATION_PATCHES
from .catalog_scheduler import SCHEDULER_PATCHES
from .catalog_shared import SHARED
from .contracts import Target
from .entries import Patch, When

__all__ = ["PATCHES", "Patch", "When"]

_SERVE = "vllm.entrypoints.cli.serve"
_LAUNCHER = "vllm.entrypoints.launchers.launcher"
_CLIENT = "vllm.v1.engine.core_client"
_CORE = "vllm.v1.engine.core"

PATCHES: tuple[Patch, ...] = (
    Patch(
        name="cli_arguments",
        feature="core",
        module="patch_engine_arg_utils",
        targets=(
            Target(
                module="vllm.engine.arg_utils",
                qualname="EngineArgs.add_cli_args",
                parameters=("parser",),
                binding="staticmethod",
                is_async=False,
                returns="parser",
            ),
            # Not replaced, but the patch works only because plugins are loaded in here, before
            # the attribute of EngineArgs is looked up.
            Target(
                module="vllm.engine.arg_utils",
                qualname="AsyncEngineArgs.add_cli_args",
                parameters=("parser",),
                binding="staticmethod",
                calls=("load_general_plugins", "EngineArgs.add_cli_args"),
            ),
        ),
        why="vLLM has no way for a general plugin to add options, and dies on unknown ones",
        how="EngineArgs.add_cli_args calls the original, then adds --plugins and --scalellm",
        when="cli",
        composes=True,
        remove_when="vLLM lets general plugins add options (today only platforms can, through "
        "Platform.pre_register_and_update)",
    ),
    Patch(
        name="serve_supervised",
        feature="frontend",
        module="patch_entrypoints_cli_serve",
        targets=(
            Target(
                module=_SERVE,
                qualname="run_server",
                parameters=("args",),
                is_async=True,
            ),
            # Found under this module's name, when it is called.
            Target(
                module=_SERVE,
                qualname="ServeSubcommand.cmd",
                calls=("run_multi_api_server", "run_server"),
            ),
            Target(
                module=_SERVE,
                qualname="run_multi_api_server",
                parameters=("args",),
                calls=(
                    "setup_server",
                    "APIServerProcessManager",
                    "wait_for_completion_or_failure",
                    "api_server_manager.shutdown",
                ),
                reads=("api_server_manager.processes", "envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
            ),
            Target(
                module=_SERVE,
                qualname="APIServerProcessManager",
                kind="class",
                members=("shutdown",),
            ),
            # Used by ours, with these arguments.
            Target(module="vllm.v1.utils", qualname="shutdown", parameters=("procs", "timeout")),
        ),
        why="vLLM's API servers are a fixed number of processes, and the death of one is the "
        "server's end",
        how="its process manager is replaced by one that starts our supervisor; uvicorn gets our "
        "protocol class; its refusal of runtime LoRA updates is lifted",
        when="serve",
        remove_when="vLLM replaces API servers that died and follows demand, and takes a protocol "
        "class as an option",
    ),
    Patch(
        name="worker_client",
        feature="frontend",
        module="patch_v1_engine_core_client",
        targets=(
            Target(
                module=_CLIENT,
                qualname="MPClient.__init__",
                keywords=("client_addresses",),
                # The wait for the ready messages; everything before it is there by then.
                calls=(
                    "make_zmq_socket",
                    "MsgpackEncoder",
                    "MsgpackDecoder",
                    "zmq.Socket.shadow",
                    "sync_input_socket.poll",
                    "sync_input_socket.recv_multipart",
                    "self._apply_ready_response",
                ),
                assigns=(
                    "self.input_socket",
                    "self.resources.output_socket",
                    "self.encoder",
                    "self.decoder",
                    "self.core_engines",
                    "self.utility_results",
                ),
            ),
            Target(
                module=_CLIENT,
                qualname="make_zmq_socket",
                parameters=("ctx", "path", "socket_type"),
                calls=("ctx.socket", "socket.bind"),
            ),
            Target(
                module=_CLIENT,
                qualname="AsyncMPClient._call_utility_async",
                keywords=("method", "engine"),
                is_async=True,
            ),
            Target(
                module=_CLIENT,
                qualname="AsyncMPClient.reset_mm_cache_async",
                parameters=(),
                is_async=True,
            ),
            Target(
                module=_CLIENT,
                qualname="BackgroundResources.validate_alive",
                parameters=("frames",),
            ),
        ),
        why="an engine says only once that it is ready, and connects to addresses that were bound "
        "when it started",
        how="while the client is constructed in a worker, it adopts the slot's listening sockets "
        "and reads ready messages that earlier workers heard",
        when="worker",
        remove_when="vLLM's client can join engines that run already",
    ),
    Patch(
        name="worker_server",
        feature="frontend",
        module="patch_entrypoints_launchers_launcher",
        targets=(
            Target(
                module=_LAUNCHER,
                qualname="NoSignalServer",
                kind="class",
            ),
            Target(
                module=_LAUNCHER,
                qualname="NoSignalServer.startup",
                parameters=("sockets",),
                is_async=True,
                vllm=">=0.32",
            ),
            # Set back in a forked worker, so that plugins are called in it too.
            Target(module="vllm.plugins", qualname="plugins_loaded", kind="attribute", value=False),
            # How a worker stops accepting, and asks whether it still has connections.
            Target(
                module=_LAUNCHER,
                qualname="NoSignalServer.__init__",
                assigns=("self.peer_loads", "self._accept_tasks", "self._connecting"),
                vllm=">=0.32",
            ),
            Target(
                module=_LAUNCHER,
                qualname="NoSignalServer._accept",
                is_async=True,
                vllm=">=0.32",
            ),
            # Handles signals before the server's first step, so that the worker can do so instead.
            Target(
                module=_LAUNCHER,
                qualname="serve_http",
                is_async=True,
                calls=("server.serve", "loop.add_signal_handler"),
                reads=("app.state.engine_client",),
            ),
            Target(
                module="vllm.v1.engine.async_llm",
                qualname="AsyncLLM.abort",
                parameters=("request_id", "internal"),
                is_async=True,
            ),
            Target(
                module="vllm.config.vllm",
                qualname="VllmConfig",
                kind="class",
                members=("shutdown_timeout",),
            ),
        ),
        why="nothing says when an API server accepts connections, and nothing makes it stop "
        "without ending them",
        how="the server's startup, once done, hands the server to the worker, which handles "
        "signals from then on",
        when="worker",
        remove_when="vLLM has a hook for a started server",
    ),
    *SHARED,
    *IPC,
    *SCHEDULER_PATCHES,
    *QUANTIZATION_PATCHES,
    Patch(
        name="engine_abort_client",
        feature="frontend",
        module="patch_v1_engine_core",
        targets=(
            Target(
                module=_CORE,
                qualname="EngineCore",
                kind="class",
                members=("abort_requests",),
            ),
            Target(
                module=_CORE,
                qualname="EngineCore.abort_requests",
                parameters=("request_ids",),
                calls=("self.scheduler.finish_requests",),
            ),
            # Utility calls find the method by its name.
            Target(
                module=_CORE,
                qualname="EngineCoreProc._handle_client_request",
                calls=("getattr",),
            ),
            Target(
                module="vllm.v1.core.sched.scheduler",
                qualname="Scheduler.__init__",
                assigns=("self.requests",),
            ),
            Target(
                module="vllm.v1.request",
                qualname="Request.__init__",
                assigns=("self.client_index",),
            ),
        ),
        why="an engine does not notice that an API server died, and generates for nobody",
        how="EngineCore gets a method that aborts all requests of one client; nothing else changes",
        when="engine",
        remove_when="vLLM aborts the requests of a client whose connection ended",
    ),
    Patch(
        name="engine_holds_tokens",
        feature="frontend",
        module="patch_v1_engine_core_step",
        targets=(
            Target(
                module=_CORE,
                qualname="EngineCore.step",
                parameters=(),
                is_async=False,
                calls=("self.scheduler.update_from_output",),
            ),
            Target(
                module=_CORE,
                qualname="EngineCore.step_with_batch_queue",
                parameters=(),
                is_async=False,
                calls=("self.scheduler.update_from_output",),
            ),
            # Looks the step up when plugins are loaded, and sends what it returns.
            Target(
                module=_CORE,
                qualname="EngineCore.__init__",
                assigns=("self.step_fn",),
                reads=("self.step", "self.step_with_batch_queue"),
            ),
            Target(
                module=_CORE,
                qualname="EngineCoreProc._process_engine_step",
                calls=("self.step_fn", "self.output_queue.put_nowait"),
            ),
            Target(
                module=_CORE,
                qualname="EngineCore.add_request",
                parameters=("request", "request_wave"),
                is_async=False,
            ),
            Target(
                module=_CORE,
                qualname="EngineCore.abort_requests",
                parameters=("request_ids",),
                is_async=False,
            ),
            Target(
                module=_CORE,
                qualname="EngineCoreProc._send_abort_outputs_to_client",
                parameters=("req_ids", "client_index"),
                is_async=False,
                reads=("FinishReason.ABORT",),
                calls=("self._send_finish_outputs_to_client",),
            ),
            # What ours does as well, with what is kept.
            Target(
                module=_CORE,
                qualname="EngineCoreProc._send_finish_outputs_to_client",
                calls=("EngineCoreOutput", "EngineCoreOutputs", "self.output_queue.put_nowait"),
            ),
            # Utility calls find the method that is added by its name.
            Target(
                module=_CORE,
                qualname="EngineCoreProc._handle_client_request",
                calls=("getattr",),
            ),
        ),
        why="every token of every request crosses to the API server, read or not",
        how="between scheduler and output queue, tokens of requests that asked for it are kept; "
        "what is kept of a request that ends early goes with its end, or is asked for",
        when="engine",
        remove_when="vLLM batches outputs in the engine by request (stream_interval batches only "
        "what the API server emits)",
    ),
)
