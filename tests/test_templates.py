"""Templates learnt from vLLM's handlers write what those handlers write, for other contents."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.frontends.templates import (
    CACHED,
    COMPLETION,
    CREATED,
    FINISH,
    ID,
    MARKS,
    PROMPT,
    STOP,
    STORED,
    TEXT,
    TOTAL,
    StreamTemplates,
    Template,
    TemplateError,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CONTENT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from('"\\\n\t\x00\x7f\u2028é🙂'))
)
NAMES = st.text(st.sampled_from('ab-9"\\\né🙂/'), min_size=1, max_size=12)
STOPS = st.one_of(st.none(), st.integers(0, 200_000), CONTENT)
REASONS = st.sampled_from(["stop", "length", "abort", "repetition"])


# Templates by themselves


def test_slots_are_found_wherever_they_are() -> None:
    written = json.dumps(
        {"id": MARKS[ID], "created": 17, "choices": [MARKS[TEXT], MARKS[FINISH], MARKS[STOP]]},
        separators=(",", ":"),
    ).encode()
    template = Template.learn(written)
    assert template.slots == [ID, CREATED, TEXT, FINISH, STOP]
    values = {ID: b"x", CREATED: b"1", TEXT: b"t", FINISH: b"null", STOP: b"5"}
    assert template.render(values) == b'{"id":"x","created":1,"choices":["t",null,5]}'


def test_what_is_bound_stays_bound() -> None:
    template = Template.learn(f'{{"id":"{MARKS[ID]}","created":17,"t":"{MARKS[TEXT]}"}}'.encode())
    bound = template.bind({ID: b"x", CREATED: b"5"})
    assert bound.around(TEXT) == (b'{"id":"x","created":5,"t":"', b'"}')
    assert template.slots == [ID, CREATED, TEXT], "binding changed the template of all requests"
    with pytest.raises(TemplateError, match="created"):
        template.bind({ID: b"x"}).around(TEXT)


@pytest.mark.parametrize(
    "events",
    [
        [],
        [b"data: [DONE]\n\n"],
        [MARKS[TEXT].encode(), b"data: [DONE]\n\n"],
        [MARKS[TEXT].encode(), MARKS[TEXT].encode(), b"data: [DONE]\n\n"],
        [MARKS[TEXT].encode(), f'{MARKS[TEXT]}"{MARKS[FINISH]}"'.encode()],
        [
            MARKS[TEXT].encode(),
            f'{MARKS[TEXT]}"{MARKS[FINISH]}"'.encode(),
            b"1",
            b"2",
            b"data: [DONE]",
        ],
    ],
)
def test_a_stream_of_another_shape_is_not_guessed_at(events: list[bytes]) -> None:
    with pytest.raises(TemplateError, match="vLLM"):
        StreamTemplates(events)


# Against vLLM


@cache
def learnt(path: str, details: bool, forced: bool) -> Any:
    """A route that has learnt from a handler with these flags."""
    pytest.importorskip("vllm")
    import copy

    from scalellm_plugins.frontends.routes import ChatRoute, CompletionRoute

    from .lane_parts import bench

    known = bench().routes[path]
    handler = copy.copy(known.handler)
    handler.enable_prompt_tokens_details = details
    handler.enable_force_include_usage = forced
    route = (ChatRoute if path == CHAT else CompletionRoute)(handler, known.prompts)
    bench().run(route.learn(bench().tokenizer))
    return route


def result(name: str, text: str, tokens: int, prompt: int, cached: int, end: Any = None) -> Any:
    """A result of the engine, as vLLM's output processor would yield it."""
    from vllm.outputs import CompletionOutput, RequestOutput

    reason, stop_reason = end or (None, None)
    return RequestOutput(
        request_id=name,
        prompt="",
        prompt_token_ids=[0] * prompt,
        prompt_logprobs=None,
        outputs=[
            CompletionOutput(
                index=0,
                text=text,
                token_ids=[0] * tokens,
                cumulative_logprob=None,
                logprobs=None,
                finish_reason=reason,
                stop_reason=stop_reason,
            )
        ],
        finished=end is not None,
        num_cached_tokens=cached,
        num_cache_creation_tokens=cached + 1,
    )


def escaped(text: str) -> bytes:
    """A text as it stands in JSON."""
    from scalellm_plugins.frontends.detokenize import escape

    return bytes(escape(text))


def encoded(value: Any) -> bytes:
    """A value as the lane puts it into a template."""
    return json.dumps(value, ensure_ascii=False).encode()


async def _each(items: list[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item


async def vllm_stream(
    route: Any, fields: dict[str, Any], name: str, items: list[Any]
) -> list[bytes]:
    """What vLLM's generator writes for these results."""
    from scalellm_plugins.frontends import probes

    handler, model = route.handler, route.handler.models.model_name(None)
    metadata = probes._protocol(handler, "RequestResponseMetadata")(request_id=name)
    if route.path == CHAT:
        made = route.request_class(messages=[{"role": "user", "content": "x"}], **fields)
        stream = handler.chat_completion_stream_generator(
            made, _each(items), name, model, [], None, metadata
        )
    else:
        made = route.request_class(prompt="x", **fields)
        prompts = [{"type": "token", "prompt_token_ids": [0], "prompt": ""}]
        stream = handler.completion_stream_generator(
            made,
            prompts,
            probes._numbered(_each(items)),
            name,
            0,
            model,
            num_prompts=1,
            tokenizer=None,
            request_metadata=metadata,
        )
    return [event.encode() async for event in stream]


def at_zero(written: bytes) -> bytes:
    """The time of creation is the moment's."""
    return re.sub(rb'"created":\d+', b'"created":0', written, count=1)


KINDS = [(False, False), (True, False), (True, True)]


@pytest.mark.vllm
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)])
@given(
    name=NAMES,
    texts=st.lists(CONTENT.filter(bool), min_size=1, max_size=3),
    end=st.tuples(REASONS, STOPS),
    counts=st.tuples(st.integers(1, 2000), st.integers(0, 900), st.integers(1, 5)),
)
def test_streams_are_what_vllm_writes(
    path: str,
    kind: tuple[bool, bool],
    flags: tuple[bool, bool],
    name: str,
    texts: list[str],
    end: tuple[str, Any],
    counts: tuple[int, int, int],
) -> None:
    route = learnt(path, *flags)
    prompt, cached, each = counts
    fields = {
        "stream": True,
        "stream_options": {"include_usage": kind[0], "continuous_usage_stats": kind[1]},
    }
    items = [result(name, text, each, prompt, cached) for text in texts[:-1]]
    items.append(result(name, texts[-1], each, prompt, cached, end))
    theirs = asyncio.run(vllm_stream(route, fields, name, items))

    templates = route.streams[(True, True) if flags[1] else kind]
    identity = {ID: encoded(name)[1:-1], CREATED: b"0"}

    def values(number: int, text: str = "") -> dict[str, bytes]:
        tokens = number * each
        numbers = {PROMPT: prompt, COMPLETION: tokens, TOTAL: prompt + tokens}
        numbers |= {CACHED: cached, STORED: cached + 1}
        written = {slot: b"%d" % count for slot, count in numbers.items()}
        return {**identity, **written, TEXT: escaped(text)}

    ours = [templates.first.render(values(0))] if templates.first.parts != () else []
    for number, text in enumerate(texts[:-1], 1):
        ours.append(templates.delta.render(values(number, text)))
    ending = {FINISH: encoded(end[0]), STOP: encoded(end[1])}
    ours.append(templates.finish.render({**values(len(texts), texts[-1]), **ending}))
    if templates.usage is not None:
        ours.append(templates.usage.render(values(len(texts))))
    ours.append(templates.done)
    assert b"".join(ours) == b"".join(map(at_zero, theirs))


@pytest.mark.vllm
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("details", [False, True])
@given(
    name=NAMES,
    text=CONTENT,
    end=st.tuples(REASONS, STOPS),
    counts=st.tuples(st.integers(1, 2000), st.integers(0, 900), st.integers(0, 99)),
)
def test_documents_are_what_vllm_writes(
    path: str, details: bool, name: str, text: str, end: Any, counts: tuple[int, int, int]
) -> None:
    from starlette.responses import JSONResponse

    from scalellm_plugins.frontends import probes

    route = learnt(path, details, False)
    handler, model = route.handler, route.handler.models.model_name(None)
    prompt, cached, tokens = counts
    final = result(name, text, tokens, prompt, cached, end)
    metadata = probes._protocol(handler, "RequestResponseMetadata")(request_id=name)
    if path == CHAT:
        made = route.request_class(messages=[{"role": "user", "content": "x"}])
        response = asyncio.run(
            handler.chat_completion_full_generator(
                made, _each([final]), name, model, [], None, metadata
            )
        )
    else:
        made = route.request_class(prompt="x")
        response = handler.request_output_to_completion_response(
            [final], made, name, 0, model, None, metadata
        )
    theirs = bytes(JSONResponse(response.model_dump()).body)
    numbers = {PROMPT: prompt, COMPLETION: tokens, TOTAL: prompt + tokens}
    numbers |= {CACHED: cached, STORED: cached + 1}
    values = {slot: b"%d" % count for slot, count in numbers.items()}
    values |= {ID: encoded(name)[1:-1], CREATED: b"0", TEXT: escaped(text)}
    values |= {FINISH: encoded(end[0]), STOP: encoded(end[1])}
    assert route.full.render(values) == at_zero(theirs)


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    learnt.cache_clear()
