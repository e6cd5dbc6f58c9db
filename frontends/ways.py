"""The ways in of a request's terms (`scheduling/terms.py`), and of what its tenant's entry says.

The fast lane reads them itself and leaves whatever is not valid to vLLM's own code. That is wrapped
here, on the instances: `generate`, which every generating route calls before its status is out,
refuses what is not valid; the output processor's `add_request`, which sees each of the engine's
requests, puts the terms of headers and of the tenant's entry into it. So both lanes say the same
about the same mistake, whatever the route, and vLLM's own frontend (`--scalellm.frontend off`),
where headers do not arrive, says it about bodies. (A `true` in a body is a 1 by then, to vLLM's
request classes.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from scalellm_plugins.errors import TermError
from scalellm_plugins.scheduling import terms

from . import counting, engine_refusals
from .engine_refusals import Held, headers_wait, until_refused
from .refusals import is_anthropic

if TYPE_CHECKING:
    from .bound import Bound


class Exchange:
    """One request that vLLM's application serves, and its answer."""

    __slots__ = ("_headers", "held")

    def __init__(self, headers: list[tuple[bytes, bytes]], held: Held) -> None:
        self._headers = headers
        self.held = held

    @property
    def said(self) -> dict[str, Any]:
        """Terms in its headers.

        Raises:
            TermError: one is not valid.
        """
        return terms.in_headers(self._headers)


_current: ContextVar[Exchange | None] = ContextVar("scalellm_exchange", default=None)
"""The request that a task of vLLM's application serves."""


def carried(app: Any) -> Any:
    """Return the application with each of its requests in its context, until it has done."""

    async def with_exchange(scope: Any, receive: Any, send: Any) -> None:
        held = Held(send, anthropic=is_anthropic(scope))
        _current.set(Exchange(scope["headers"], held))
        try:
            await app(scope, receive, held)
        finally:
            held.close()

    return with_exchange


def install(engine_client: Any, state: Any, stranger: Callable[[], Bound | None]) -> None:
    """Wrap an engine client (an `AsyncLLM`) and the handlers in an application's state.

    After whatever counts prompts: what is refused here must not have been counted.

    Args:
        engine_client: has no other way in than its `generate`, of generating ones.
        state: the application's.
        stranger: returns what binds a request without a pass, where a tenants file does.
    """
    engine_client.generate = _checked(engine_client.generate)
    processor = engine_client.output_processor
    processor.add_request = _placed(processor.add_request, stranger)
    serving = getattr(state, "openai_serving_responses", None)
    if serving is not None:
        serving.create_responses = _looked_at(serving.create_responses)
    engine_refusals.tell_in_streams(state)


def _checked(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("prompt", "sampling_params"), args, strict=False)) | kwargs
        exchange = _current.get()
        said = _said(getattr(given.get("sampling_params"), "extra_args", None), exchange)
        held = None if exchange is None else exchange.held
        if held is not None:
            ticket = counting.current.get()
            bound = None if ticket is None else ticket.bound
            held.wait_s = headers_wait(said if bound is None else bound.extra | said)
        return until_refused(original(*args, **kwargs), held)

    return generate


def _looked_at(original: Callable[..., Any]) -> Callable[..., Any]:
    """Look at a response's terms before its stream begins, or its work in the background."""

    async def create_responses(request: Any, *args: Any, **kwargs: Any) -> Any:
        _said(getattr(request, "vllm_xargs", None), _current.get())
        return await original(request, *args, **kwargs)

    return create_responses


def _said(extra_args: Mapping[str, Any] | None, exchange: Exchange | None) -> dict[str, Any]:
    """Return a request's terms: what its headers say comes before what its body says.

    Raises:
        VLLMValidationError: one is not valid; vLLM answers 400.
    """
    try:
        return terms.in_body(extra_args) | ({} if exchange is None else exchange.said)
    except TermError as error:
        raise _invalid()(str(error), parameter=error.field) from None


@functools.cache
def _invalid() -> Any:
    from vllm.exceptions import VLLMValidationError

    class InvalidTerm(VLLMValidationError):  # type: ignore[misc]
        """Whose text names the field already: vLLM would add it."""

        def __str__(self) -> str:
            return str(self.args[0])

    return InvalidTerm


def _placed(
    original: Callable[..., Any], stranger: Callable[[], Bound | None]
) -> Callable[..., Any]:
    def add_request(request: Any, *args: Any, **kwargs: Any) -> Any:
        exchange, ticket = _current.get(), counting.current.get()
        bound = stranger() if ticket is None else ticket.bound
        if request.sampling_params is not None and (exchange is not None or bound is not None):
            place(request, {} if exchange is None else exchange.said, bound)
        return original(request, *args, **kwargs)

    return add_request


def place(request: Any, said: Mapping[str, Any], bound: Bound | None) -> None:
    """Put terms into a request for the engine (an `EngineCoreRequest` of vLLM's own making).

    Several answers to one prompt may share their parameters: doing it again changes nothing.

    Args:
        request: its extra arguments have what its body said.
        said: in its headers.
        bound: whose request it is, where a file says so.
    """
    params = request.sampling_params
    given = params.extra_args or {}
    made = {name: value for name, value in given.items() if not name.startswith(terms.PREFIX)}
    own = {name: given[name] for name in terms.SAID if name in given} | dict(said)
    if bound is None:
        made |= own
    else:
        made |= bound.extra | bound.own(own)
        request.priority = request.priority or bound.priority
        request.cache_salt = bound.salted(request.cache_salt)
    params.extra_args = made or None  # a new one: the client's may be shared
