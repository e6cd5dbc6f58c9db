"""Have vLLM's own handlers write a made-up answer, from which the templates are learnt.

The handlers' generators are called with results of the engine that nobody generated: no engine is
involved. Their signatures are part of the contracts in `patches/seams.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse

from .templates import (
    CACHED_TOKENS,
    COMPLETION_TOKENS,
    FINISH,
    ID,
    MARKS,
    PROMPT_TOKENS,
    STOP,
    STORED_TOKENS,
    TEXT,
    StreamTemplates,
    Template,
    TemplateError,
)

StreamKind = tuple[bool, bool]
"""(include_usage, continuous_usage_stats) as requested."""

STREAM_KINDS: tuple[StreamKind, ...] = ((False, False), (True, False), (True, True))


def _result(*, finished: bool, tokens: int) -> Any:
    """Make one `RequestOutput` as the engine client would yield it."""
    from vllm.outputs import CompletionOutput, RequestOutput

    output = CompletionOutput(
        index=0,
        text=MARKS[TEXT],
        token_ids=[0] * tokens,
        cumulative_logprob=None,
        logprobs=None,
        finish_reason=MARKS[FINISH] if finished else None,
        stop_reason=MARKS[STOP] if finished else None,
    )
    return RequestOutput(
        request_id=MARKS[ID],
        prompt="",
        prompt_token_ids=[0] * PROMPT_TOKENS,
        prompt_logprobs=None,
        outputs=[output],
        finished=finished,
        num_cached_tokens=CACHED_TOKENS,
        num_cache_creation_tokens=STORED_TOKENS,
    )


async def _results(*, streamed: bool) -> AsyncIterator[Any]:
    if streamed:
        yield _result(finished=False, tokens=1)
        yield _result(finished=True, tokens=COMPLETION_TOKENS - 1)
    else:
        yield _result(finished=True, tokens=COMPLETION_TOKENS)


async def _numbered(results: AsyncIterator[Any]) -> AsyncIterator[tuple[int, Any]]:
    async for result in results:
        yield 0, result


def _stream_fields(kind: StreamKind) -> dict[str, Any]:
    if not any(kind):
        return {"stream": True}
    options = {"include_usage": kind[0], "continuous_usage_stats": kind[1]}
    return {"stream": True, "stream_options": options}


def _protocol(handler: Any, name: str) -> Any:
    """A class that the handler's own module uses, wherever this release keeps it."""
    import sys

    return getattr(sys.modules[type(handler).__module__], name)


def _events(written: list[str]) -> list[bytes]:
    return [event.encode() for event in written]


async def chat_stream(handler: Any, tokenizer: Any, kind: StreamKind) -> StreamTemplates:
    """Learn a streamed chat completion. `handler`: vLLM's `OpenAIServingChat`.

    Raises:
        TemplateError: the generator wrote something else than expected.
    """
    request = _protocol(handler, "ChatCompletionRequest")(
        messages=[{"role": "user", "content": ""}], **_stream_fields(kind)
    )
    metadata = _protocol(handler, "RequestResponseMetadata")(request_id=MARKS[ID])
    generator = handler.chat_completion_stream_generator(
        request,
        _results(streamed=True),
        MARKS[ID],
        handler.models.model_name(None),
        [{"role": "user", "content": ""}],
        tokenizer,
        metadata,
    )
    return StreamTemplates(_events([event async for event in generator]))


async def chat_full(handler: Any, tokenizer: Any) -> Template:
    """Learn a chat completion in one piece."""
    request = _protocol(handler, "ChatCompletionRequest")(
        messages=[{"role": "user", "content": ""}]
    )
    metadata = _protocol(handler, "RequestResponseMetadata")(request_id=MARKS[ID])
    response = await handler.chat_completion_full_generator(
        request,
        _results(streamed=False),
        MARKS[ID],
        handler.models.model_name(None),
        [{"role": "user", "content": ""}],
        tokenizer,
        metadata,
    )
    return _learn_full(response)


async def completion_stream(handler: Any, tokenizer: Any, kind: StreamKind) -> StreamTemplates:
    """Learn a streamed completion. `handler`: vLLM's `OpenAIServingCompletion`."""
    request = _protocol(handler, "CompletionRequest")(prompt="x", **_stream_fields(kind))
    metadata = _protocol(handler, "RequestResponseMetadata")(request_id=MARKS[ID])
    generator = handler.completion_stream_generator(
        request,
        [{"type": "token", "prompt_token_ids": [0], "prompt": ""}],
        _numbered(_results(streamed=True)),
        MARKS[ID],
        0,
        handler.models.model_name(None),
        num_prompts=1,
        tokenizer=tokenizer,
        request_metadata=metadata,
    )
    return StreamTemplates(_events([event async for event in generator]))


async def completion_full(handler: Any, tokenizer: Any) -> Template:
    """Learn a completion in one piece."""
    request = _protocol(handler, "CompletionRequest")(prompt="x")
    metadata = _protocol(handler, "RequestResponseMetadata")(request_id=MARKS[ID])
    response = handler.request_output_to_completion_response(
        [_result(finished=True, tokens=COMPLETION_TOKENS)],
        request,
        MARKS[ID],
        0,
        handler.models.model_name(None),
        tokenizer,
        metadata,
    )
    return _learn_full(response)


def _learn_full(response: Any) -> Template:
    template = Template.learn(bytes(JSONResponse(response.model_dump()).body))
    if not {ID, TEXT, FINISH, STOP} <= set(template.slots):
        raise TemplateError(f"unexpected answer of vLLM: {response!r}")
    return template
