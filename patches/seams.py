"""Seams: what the features rely on in vLLM without patching it, as contracts.

`scalellm doctor` compares them with the installed vLLM or with a wheel, so that a release which
breaks one says so before anybody serves with it. Where a seam changed within the supported range,
it is described once per form, each with its own range. Pure data.
"""

from __future__ import annotations

from dataclasses import dataclass

from scalellm_plugins.features import SUPPORTED_VLLM

from .contracts import Target


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What patches and seams share: whose they are, what must hold upstream, and where.

    `feature` is a name of `features.FEATURES`, or "core" for what every feature needs. Outside
    the range `vllm` the feature cannot be on.
    """

    name: str
    feature: str
    targets: tuple[Target, ...]
    why: str
    vllm: str = SUPPORTED_VLLM


@dataclass(frozen=True, kw_only=True)
class Seam(Entry):
    """Something of vLLM's that a feature uses as it is."""


_PLUGINS = "vllm.plugins"
_ENDPOINTS = "vllm.plugins.endpoint_plugins.interface"
_EXECUTOR = "vllm.v1.executor.abstract"
_OUTPUTS = "vllm.v1.core.sched.output"
_PROCESSES = "vllm.v1.utils"
_CORE = "vllm.v1.engine.core"

CORE = (
    Seam(
        name="plugin_loading",
        feature="core",
        why="register() runs in every vLLM process, and VLLM_PLUGINS decides by name",
        targets=(
            Target(
                module=_PLUGINS,
                qualname="DEFAULT_PLUGINS_GROUP",
                kind="attribute",
                value="vllm.general_plugins",
            ),
            Target(
                module=_PLUGINS,
                qualname="load_plugins_by_group",
                parameters=("group",),
                reads=("envs.VLLM_PLUGINS",),
            ),
            Target(
                module=_PLUGINS,
                qualname="load_general_plugins",
                parameters=(),
                calls=("load_plugins_by_group",),
            ),
            Target(
                module="vllm.engine.arg_utils",
                qualname="EngineArgs.__post_init__",
                calls=("load_general_plugins",),
            ),
            # Before the executor and the scheduler are made: features choose their classes.
            Target(
                module=_CORE,
                qualname="EngineCore.__init__",
                calls=("load_general_plugins", "executor_class", "get_scheduler_cls"),
            ),
        ),
    ),
    Seam(
        name="command_line",
        feature="core",
        why="options are added while `vllm serve` builds its parser, and parsed with the rest",
        targets=(
            Target(
                module=(
                    "vllm.entrypoints.common.cli_args",  # since 0.33
                    "vllm.entrypoints.launchers.cli_args",
                ),
                qualname="make_arg_parser",
                parameters=("parser",),
                calls=("AsyncEngineArgs.add_cli_args",),
            ),
            Target(
                module="vllm.utils.argparse_utils",
                qualname="FlexibleArgumentParser.parse_args",
                parameters=("args", "namespace"),
            ),
            # It builds the parser anew, which must then have the same options.
            Target(
                module=(
                    "vllm.entrypoints.common.startup",  # since 0.33
                    "vllm.entrypoints.serve.utils.api_utils",
                ),
                qualname="get_non_default_args",
                parameters=("args",),
                calls=("make_arg_parser",),
            ),
        ),
    ),
)

STATUS = (
    Seam(
        name="endpoint_plugins",
        feature="status",
        why="the route /scalellm/features is an endpoint plugin's",
        targets=(
            Target(
                module=_PLUGINS,
                qualname="ENDPOINT_PLUGINS_GROUP",
                kind="attribute",
                value="vllm.endpoint_plugins",
            ),
            Target(
                module=_PLUGINS,
                qualname="load_endpoint_plugins",
                parameters=("supported_tasks",),
                # Loaded only where VLLM_PLUGINS names them.
                reads=("envs.VLLM_PLUGINS", "plugin.required_tasks"),
                calls=("load_plugins_by_group",),
            ),
            Target(
                module=_ENDPOINTS,
                qualname="EndpointPlugin",
                kind="class",
                members=("name", "required_tasks", "attach_router", "init_state"),
            ),
            Target(
                module=_ENDPOINTS,
                qualname="EndpointPlugin.attach_router",
                parameters=("app",),
                is_async=False,
            ),
            Target(
                module=_ENDPOINTS,
                qualname="EndpointPlugin.init_state",
                parameters=("engine_client", "state", "args"),
                is_async=True,
            ),
        ),
    ),
    Seam(
        name="endpoint_hooks",
        feature="status",
        why="the API server calls both halves of an endpoint plugin",
        targets=(
            Target(
                module="vllm.entrypoints.launchers.app",
                qualname="build_app",
                calls=("attach_endpoint_plugins",),
            ),
            Target(
                module="vllm.entrypoints.launchers.api_server.app_state",
                qualname="init_app_state",
                is_async=True,
                calls=("init_endpoint_plugins_state",),
            ),
        ),
    ),
)

SIM = (
    Seam(
        name="executor",
        feature="sim",
        why="the simulated GPU is an Executor that answers the engine's calls itself",
        targets=(
            Target(
                module=_EXECUTOR,
                qualname="Executor",
                kind="class",
                implements=("_init_executor", "collective_rpc", "check_health"),
                # Overridden: under another name upstream's would run, and ask for a worker.
                members=(
                    "compile_or_warm_up_model",
                    "determine_available_memory",
                    "execute_dummy_batch",
                    "execute_model",
                    "get_kv_cache_specs",
                    "get_supported_kv_cache_layouts",
                    "initialize_from_config",
                    "sample_tokens",
                    "set_kv_cache_layout",
                    "shutdown",
                    "supports_async_scheduling",
                    "supports_pp",
                    "take_draft_token_ids",
                ),
            ),
            Target(
                module=_EXECUTOR,
                qualname="Executor.__init__",
                parameters=("vllm_config",),
                assigns=("self.cache_config", "self.model_config"),
                calls=("self._init_executor",),
            ),
            Target(
                module=_EXECUTOR,
                qualname="Executor.collective_rpc",
                parameters=("method", "timeout", "args", "kwargs", "non_block"),
            ),
            Target(
                module=_EXECUTOR,
                qualname="Executor.execute_model",
                parameters=("scheduler_output", "non_block"),
            ),
            Target(
                module=_EXECUTOR,
                qualname="Executor.sample_tokens",
                parameters=("grammar_output", "non_block"),
            ),
            Target(
                module=_EXECUTOR,
                qualname="Executor.get_class",
                binding="staticmethod",
                reads=("parallel_config.distributed_executor_backend",),
                calls=("resolve_obj_by_qualname",),
            ),
            Target(
                module="vllm.v1.outputs",
                qualname="ModelRunnerOutput",
                kind="class",
                constructed_with=("req_ids", "req_id_to_index", "sampled_token_ids", "logprobs"),
            ),
            Target(
                module=_OUTPUTS,
                qualname="SchedulerOutput",
                kind="class",
                members=(
                    "scheduled_new_reqs",
                    "scheduled_cached_reqs",
                    "num_scheduled_tokens",
                    "total_num_scheduled_tokens",
                    "finished_req_ids",
                ),
            ),
        ),
    ),
    Seam(
        name="platform",
        feature="sim",
        why="the simulated GPU is a platform, found by name and asked to complete the config",
        targets=(
            Target(
                module=_PLUGINS,
                qualname="PLATFORM_PLUGINS_GROUP",
                kind="attribute",
                value="vllm.platform_plugins",
            ),
            Target(
                module="vllm.platforms",
                qualname="resolve_current_platform_cls_qualname",
                parameters=(),
                calls=("load_plugins_by_group",),
            ),
            # None until vLLM first needs it: how the command line sees that it came too late.
            Target(
                module="vllm.platforms",
                qualname="_current_platform",
                kind="attribute",
                value=None,
            ),
            Target(
                module="vllm.platforms.interface",
                qualname="Platform",
                kind="class",
                # Overridden: under another name upstream's would run, and ask for a device.
                members=(
                    "apply_config_platform_defaults",
                    "get_current_memory_usage",
                    "get_device_name",
                    "get_device_total_memory",
                    "import_kernels",
                    "inference_mode",
                    "is_pin_memory_available",
                    "manual_seed_all",
                    "num_compute_units",
                    "set_device",
                    "support_hybrid_kv_cache",
                    "validate_request",
                ),
            ),
            Target(
                module="vllm.platforms.interface",
                qualname="Platform.check_and_update_config",
                parameters=("vllm_config",),
                binding="classmethod",
            ),
        ),
    ),
)

FRONTEND = (
    Seam(
        name="api_server_processes",
        feature="frontend",
        why="--api-server-count starts the workers, through APIServerProcessManager",
        targets=(
            Target(
                module="vllm.entrypoints.cli.serve",
                qualname="ServeSubcommand.cmd",
                parameters=("args",),
                binding="staticmethod",
                reads=("args.api_server_count",),
                calls=("run_multi_api_server",),
            ),
            Target(
                module="vllm.entrypoints.cli.serve",
                qualname="run_multi_api_server",
                parameters=("args",),
                calls=("APIServerProcessManager",),
            ),
            Target(
                module=_PROCESSES,
                qualname="APIServerProcessManager.__init__",
                keywords=("listen_address", "sock", "args", "num_servers", "target_server_fn"),
                reads=("target_server_fn",),
                calls=("spawn_context.Process",),
            ),
            # Addresses that the children bind, until the parent came to bind the sockets itself.
            Target(
                module=_PROCESSES,
                qualname="APIServerProcessManager.__init__",
                keywords=("input_addresses", "output_addresses"),
                vllm="<0.32",
            ),
            Target(
                module=_PROCESSES,
                qualname="APIServerProcessManager.__init__",
                keywords=("input_listeners", "output_listeners"),
                vllm=">=0.32",
            ),
        ),
    ),
    Seam(
        name="api_server_worker",
        feature="frontend",
        why="a worker runs vLLM's own FastAPI app beside the fast lane",
        targets=(
            Target(
                module="vllm.entrypoints.launchers.api_server.entry",
                qualname="run_server_worker",
                parameters=("listen_address", "sock", "args", "client_config"),
                is_async=True,
            ),
            Target(
                module="vllm.entrypoints.launchers.app",
                qualname="build_app",
                parameters=("args", "supported_tasks", "model_config"),
            ),
            # Its hook `init_state` is where the fast lane is put beside the core routes.
            Target(
                module=_ENDPOINTS,
                qualname="attach_endpoint_plugins",
                parameters=("app", "supported_tasks"),
                assigns=("app.openapi_schema",),
                vllm=">=0.32",
            ),
        ),
    ),
)

READY: tuple[Seam, ...] = (*CORE, *STATUS, *SIM, *FRONTEND)
"""Seams of what is built; those of planned features are in `planned_seams.py`."""
