"""Prompt tokens and first tokens of the requests that vLLM's own code serves.

Wrapped on the instances, and only where a gate is: the engine client's `generate` and `encode`
(where every route hands over a prompt, before the status of a stream is out, and whose generator
ends with the engine's work) and two methods of the output processor (where the engine's request
exists, and where its first output arrives). That is exact: no length is guessed from bytes, and
nothing depends on which route it was. `n` copies of a prompt count n times, as they do in vLLM.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from .admission import Prompt
from .limits import Refusal

if TYPE_CHECKING:
    from .gate import Pass

current: ContextVar[Pass | None] = ContextVar("scalellm_pass", default=None)
"""The admitted request that a task of vLLM's application serves."""

_work: ContextVar[_Work | None] = ContextVar("scalellm_work", default=None)


class _Work:
    """One call of `generate`: its prompt, and the engine's requests whose first token is due."""

    __slots__ = ("ids", "known", "prompt")

    def __init__(self, prompt: Prompt, *, known: bool) -> None:
        self.prompt = prompt
        self.known = known
        self.ids: list[str] = []


def install(engine_client: Any) -> None:
    """Count what passes through an engine client (an `AsyncLLM`)."""
    due: dict[str, _Work] = {}
    engine_client.generate = _counted(engine_client.generate, due)
    engine_client.encode = _counted(engine_client.encode, due)
    processor = engine_client.output_processor
    processor.add_request = _added(processor.add_request, due)
    processor.process_outputs = _noticed(processor.process_outputs, due)


def _counted(original: Callable[..., Any], due: dict[str, _Work]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        ticket = current.get()
        if ticket is None:
            return original(*args, **kwargs)
        given = dict(zip(("prompt", "sampling_params"), args, strict=False)) | kwargs
        tokens = prompt_tokens(given["prompt"])
        copies = getattr(given.get("sampling_params"), "n", 1) or 1
        prompt = ticket.count((tokens or 0) * copies, running=True)
        if isinstance(prompt, Refusal):
            raise _error(prompt, ticket)
        return _follow(original(*args, **kwargs), _Work(prompt, known=tokens is not None), due)

    return call


def _error(refusal: Refusal, ticket: Pass) -> Exception:
    from vllm.exceptions import GracefulHTTPError

    # What the client sees is written by the pass, unless the stream has already begun.
    error: Exception = GracefulHTTPError(
        refusal.message(ticket.retry_after(refusal)), HTTPStatus(refusal.status)
    )
    return error


async def _follow(inner: Any, work: _Work, due: dict[str, _Work]) -> AsyncGenerator[Any, None]:
    _work.set(work)  # read in the first step of `inner`, which is taken in this same task
    try:
        async for output in inner:
            yield output
    finally:
        for request_id in work.ids:
            due.pop(request_id, None)
        work.prompt.done()
        await inner.aclose()


def _added(original: Callable[..., Any], due: dict[str, _Work]) -> Callable[..., Any]:
    def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
        work = _work.get()
        original(request, *args, **kwargs)
        if work is not None:
            work.ids.append(request.request_id)
            due[request.request_id] = work
            if not work.known:
                work.prompt.grow(_length(request.prompt_token_ids, request.prompt_embeds))

    return add_request


def _noticed(original: Callable[..., Any], due: dict[str, _Work]) -> Callable[..., Any]:
    def process_outputs(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if due:
            for output in outputs:
                work = due.pop(output.request_id, None)
                if work is not None:
                    work.prompt.first()
        return original(outputs, *args, **kwargs)

    return process_outputs


def prompt_tokens(prompt: Any) -> int | None:
    """Return the length of a prompt as the engine client is given it; None where it is text."""
    if isinstance(prompt, dict):
        prompt = prompt.get("decoder_prompt", prompt)
        ids, embeds = prompt.get("prompt_token_ids"), prompt.get("prompt_embeds")
    elif isinstance(prompt, list):
        ids, embeds = prompt, None
    else:  # a request for the engine, ready made
        ids, embeds = getattr(prompt, "prompt_token_ids", None), None
    return None if ids is None and embeds is None else _length(ids, embeds)


def _length(ids: Any, embeds: Any) -> int:
    return len(ids) if ids is not None else 0 if embeds is None else len(embeds)
