"""Bad requests that vLLM answers with 500, or not at all: here they get 400 in vLLM's own words.

What its checks find, and any ValueError, TypeError or OverflowError, is 400 in vLLM. Three kinds of
requests get past that in 0.29 to 0.33:

- those that its own reading trips over, with an AttributeError, IndexError, …:
  `structured_outputs` that is a string, an assistant's message without content
  (`install_handlers`);
- those that do not get as far as the engine: an integer of more than 64 bits in a JSON schema, half
  a surrogate pair in a stop string. vLLM also keeps most of these for ever (`guard_engine`);
- streams of /v1/responses whose parameters the engine client refuses: their status is out, and
  the connection is cut (`guard_responses`; they get an event `error`).

An error of any other origin stays what vLLM makes of it. Nothing here is in a good request's way.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import AsyncGenerator
from typing import Any

logger = logging.getLogger("vllm.scalellm")

_TRIPS = (AttributeError, LookupError, AssertionError, RecursionError)

_READING = (
    "starlette.requests",
    "pydantic.type_adapter",
    "vllm.renderers",
    "vllm.entrypoints.openai.responses.utils",  # called by no renderer in 0.29
    "vllm.entrypoints.serve.elastic_ep.api_router",  # reads its JSON by hand
)
"""Modules through which a body becomes a prompt; what they call is about the request alone."""

_READERS = ("json", "pydantic", "vllm.entrypoints", "vllm.renderers")
"""Where it then went wrong, if the request is to blame, and not a tokenizer or a processor."""

_UNFIT = (ValueError, TypeError, OverflowError, RecursionError)
"""What is wrong with a request that does not get as far as the engine. vLLM's own list, and one."""

_LEVELS = 64
"""How deep extra arguments (`kv_transfer_params`) may be nested: as deep as vLLM lets JSON schemas.

700 levels end the engine, and with it the server, where it has workers: it pickles them.
"""


def install(engine_client: Any, app: Any, state: Any) -> None:
    """Put all three around one API server's objects, before it serves."""
    install_handlers(app)
    guard_engine(engine_client)
    serving = getattr(state, "openai_serving_responses", None)
    if serving is not None:
        guard_responses(serving)


# Reading


def install_handlers(app: Any) -> None:
    """Answer what vLLM's reading of a request trips over; kinds that vLLM handles stay its own."""
    from vllm.exceptions import VLLMError, VLLMValidationError

    answer = app.exception_handlers.get(VLLMError)
    if answer is None:
        return

    async def handle(request: Any, error: Exception) -> Any:
        message = complaint(error)
        if message is None:
            raise error
        logger.info("400 instead of 500: %s", message)
        logger.debug("where:", exc_info=error)
        return await answer(request, VLLMValidationError(message))

    for kind in _TRIPS:
        if kind not in app.exception_handlers:
            app.add_exception_handler(kind, handle)
            _add_to_built(app.middleware_stack, kind, handle)


def _add_to_built(layer: Any, kind: type[Exception], handle: Any) -> None:
    """Where a part of vLLM (for SageMaker) has built the middlewares already.

    Not built anew: some of them (HTTP metrics) register what they count once per process.
    """
    from starlette.middleware.exceptions import ExceptionMiddleware

    while layer is not None:
        if isinstance(layer, ExceptionMiddleware):
            layer.add_exception_handler(kind, handle)
        layer = getattr(layer, "app", None)


def complaint(error: Exception) -> str | None:
    """Return what to tell the client; None when it may not be the request's fault."""
    codes = [(str(frame.f_globals.get("__name__")), frame.f_code.co_name) for frame in _way(error)]
    if not codes or not _is_within(codes[-1][0], _READERS):
        return None
    if not any(_is_within(module, _READING) for module, _ in codes):
        return None
    named = [name for module, name in codes if _is_within(module, ("vllm",)) and name[0] != "<"]
    where = f" in {named[-1]}" if named else ""
    text = f": {error}" if str(error) else ""
    return f"The request cannot be understood ({type(error).__name__}{where}{text})"


def _way(error: Exception) -> list[Any]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in packages)


# Sending


def guard_engine(engine_client: Any) -> None:
    """Refuse what cannot be given to the engine, and forget what it was not given."""
    add, add_one = engine_client.add_request, engine_client._add_request

    async def add_request(*args: Any, **kwargs: Any) -> Any:
        try:
            for given in (*args, *kwargs.values()):
                if _is_deep(getattr(given, "extra_args", None), _LEVELS):
                    raise ValueError(f"JSON in it is nested more than {_LEVELS} levels deep")
            return await add(*args, **kwargs)
        except _UNFIT as error:
            raise unfit(error) from error

    async def _add_request(request: Any, *args: Any, **kwargs: Any) -> None:
        try:
            await add_one(request, *args, **kwargs)
        except _UNFIT:
            # vLLM does so for several answers to one prompt, and not for one.
            engine_client.output_processor.abort_requests([request.request_id], internal=True)
            raise

    engine_client.add_request = add_request
    engine_client._add_request = _add_request


def _is_deep(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return False
    return levels == 0 or any(_is_deep(one, levels - 1) for one in value)


def unfit(error: Exception) -> Exception:
    """Return the client's error where a request could not be sent; any other stays what it is."""
    from vllm.exceptions import VLLMValidationError

    if isinstance(error, _UNFIT):
        error = VLLMValidationError(f"The request cannot be given to the engine: {error}")
    return error


# Streams of the Responses API


def guard_responses(serving: Any) -> None:
    """End a stream that fails as OpenAI's does, with an event `error`.

    vLLM means to tell about the engine's errors itself, in a shape that its own check then refuses:
    such an error stays what it is, and comes here.
    """
    create = serving.create_responses

    def convert(error: Exception) -> str:
        raise error

    async def create_responses(*args: Any, **kwargs: Any) -> Any:
        answer = await create(*args, **kwargs)
        return _ended(serving, answer) if isinstance(answer, AsyncGenerator) else answer

    serving.create_responses = create_responses
    serving._convert_generation_error_to_streaming_response = convert


async def _ended(serving: Any, events: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    from openai.types.responses import ResponseErrorEvent

    sent = 0
    try:
        async for event in events:
            if not sent:
                event.model_dump_json()  # vLLM will: what it repeats of the request may not be text
            sent += 1
            yield event
    except Exception as error:
        told = serving.create_error_response(error)
        logger.info("a stream of /v1/responses has failed: %s", told.error.message)
        yield ResponseErrorEvent(
            type="error",
            code=told.error.type,
            message=told.error.message,
            param=told.error.param,
            sequence_number=sent,
        )
    finally:
        await events.aclose()
