"""Putting the fast lane beside vLLM's own code when an API server has built its application."""

from __future__ import annotations

import gc
import logging
from argparse import Namespace
from typing import Any

from scalellm_plugins import activation, config

from . import aborts, client_errors, gate, shared_attach, ways
from . import prompts as prompts_module
from .accounting import Accounting
from .detokenize import Detokenizer
from .headers import HeaderReader
from .lane import Lane, build_routes
from .link import Link
from .requests import reserve_names

logger = logging.getLogger("vllm.scalellm")

_PYTHONS = (700, 10, 10)  # Python's own thresholds, until 3.13; later its collector is another


def obstacles(engine_client: Any, state: Any, args: Namespace) -> list[str]:
    """Return why this server's requests must all take vLLM's own way, one line per reason."""
    server = engine_client.vllm_config
    model = engine_client.model_config
    given = {
        "--middleware": args.middleware,
        "--enable-log-requests": args.enable_log_requests,
        "--enable-log-outputs": getattr(args, "enable_log_outputs", False),
        "--enable-per-request-metrics": getattr(args, "enable_per_request_metrics", False),
        "--otlp-traces-endpoint": server.observability_config.otlp_traces_endpoint,
        "--enable-elastic-ep": getattr(server.parallel_config, "enable_elastic_ep", False),
        "--kv-transfer-config": server.kv_transfer_config,
        "--sse-keep-alive-interval": getattr(args, "sse_keep_alive_interval", 0),
        "--skip-tokenizer-init": model.skip_tokenizer_init,
        "--watermark-config": getattr(server, "watermark_config", None),
        "--return-tokens-as-token-ids": args.return_tokens_as_token_ids,
    }
    reasons = [f"{option} needs vLLM's own code" for option, value in given.items() if value]
    if getattr(model, "is_encoder_decoder", False):
        reasons.append("the model has an encoder")
    if getattr(model, "is_diffusion", False):
        reasons.append("the model is a diffusion model")
    if not hasattr(state, "openai_serving_completion"):
        reasons.append("the model does not generate text")
    level = getattr(server.observability_config, "per_request_spec_decode_metrics", "none")
    if level != "none":
        reasons.append("--per-request-spec-decode-metrics needs vLLM's own code")
    return reasons


class FastLaneEndpoint:
    """An endpoint plugin of vLLM without an endpoint: vLLM calls it when the state is ready."""

    name = "scalellm.frontend"
    required_tasks = None

    def __init__(self) -> None:
        self._app: Any = None

    def attach_router(self, app: Any) -> None:
        """Remember the application; its routes stay as they are."""
        self._app = app

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Build the lane, where this process has an engine and the feature is on."""
        if engine_client is not None and activation.is_on("frontend"):
            reserve_names(engine_client.input_processor)
            client_errors.install(engine_client, self._app, state)
            await shared_attach.attach(engine_client, self._app, state)
            made = gate.attach(engine_client, self._app, state, args)
            ways.install(engine_client, state, _nobody if made is None else made.stranger)
            await attach(engine_client, self._app, state, args)
            collect_rarely()
        elif engine_client is not None:
            gate.check_off()


class TermsEndpoint:
    """Another: checks what requests say to our scheduler where the frontend is vLLM's own."""

    name = "scalellm.scheduler"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Leave the routes as they are."""

    async def init_state(
        self,
        engine_client: Any,
        state: Any,
        args: Namespace,  # noqa: ARG002 - vLLM's interface
    ) -> None:
        """Wrap the engine client. Never raises: the engine passes over what makes no sense."""
        alone = activation.is_on("scheduler") and not activation.is_on("frontend")
        if engine_client is None or not alone:
            return
        try:
            ways.install(engine_client, state, _nobody)
        except AttributeError as error:
            logger.warning("what requests say about their scheduling is not checked: %s", error)


def _nobody() -> None:
    """No tenants file binds a request."""


def collect_rarely() -> None:
    """Look for garbage in cycles after 20,000 new objects, not 700, unless somebody has chosen.

    A request's objects go with their last reference, but for a while they are new: a collection per
    25 requests, 0.2 ms each and now and then 3 ms, in which streams stand still, 2-4 % of what an
    answer in one piece costs. Garbage of 20,000 objects is a few megabytes.
    """
    if gc.get_threshold() == _PYTHONS:
        gc.set_threshold(20_000, 10, 10)


async def attach(engine_client: Any, app: Any, state: Any, args: Namespace) -> None:
    """Build the lane and make it known to the connections; or say in one line why not.

    Never raises: without a lane the server is vLLM's own.
    """
    try:
        reasons = obstacles(engine_client, state, args)
        lane = None if reasons else await _build(engine_client, app, state, args)
    except Exception as error:
        logger.exception("the fast lane could not be built")
        reasons, lane = [f"{type(error).__name__}: {error}"], None
    if lane is None:
        logger.info("fast lane: off (%s)", "; ".join(reasons) or "no route for it")
        return
    engine_client.output_processor.process_outputs = lane.on_outputs
    aborts.install(engine_client)
    lane.link = Link.open(engine_client)
    if lane.link is not None:
        lane.link.lane = lane
    state.scalellm_lane = lane
    logger.info(
        "fast lane: on for %s; detokenizer: %s", ", ".join(lane.routes), lane.detokenizer.why
    )


async def _build(engine_client: Any, app: Any, state: Any, args: Namespace) -> Lane | None:
    import vllm.envs as envs

    tokenizer = engine_client.renderer.tokenizer
    built = prompts_module.ChatPrompts.build(
        tokenizer=tokenizer,
        model_config=engine_client.model_config,
        chat_template=state.online_renderer.chat_template,
        content_format=args.chat_template_content_format,
        default_template_kwargs=state.online_renderer.default_chat_template_kwargs,
        cache_bytes=64 << 20,
    )
    if isinstance(built, str):
        logger.info("fast lane: no prompts (%s)", built)
        return None
    routes = build_routes(state, built)
    for route in routes:
        await route.learn(tokenizer)
    if not routes:
        return None
    await engine_client.get_supported_tasks()  # kept by the client; needed without waiting
    models = state.openai_serving_models
    keys = args.api_key or [envs.VLLM_API_KEY]
    names = [path.name for path in models.base_model_paths]
    if getattr(state, "scalellm_gate", None) is not None:
        keys = []  # the gate has seen them, and tenants' keys, too
    headers = HeaderReader(app, args, names, filter(None, keys))
    accounting = Accounting(app, config.current().frontend.access_log)
    return Lane(engine_client, routes, Detokenizer.build(tokenizer), headers, accounting)
