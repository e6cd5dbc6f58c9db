"""Bodies that the lane accepts mean to vLLM what they mean to the lane; all others are declined."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scalellm_plugins.frontends import bodies

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "x"}]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30]),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.5, 1e30]),
    st.sampled_from(["", "a", "none", "auto", "text", "a/b", "x" * 129, "é", "1"]),
)
LISTS = st.lists(st.one_of(SCALARS, st.lists(SCALARS, max_size=2)), max_size=6)
OBJECTS = st.dictionaries(
    st.sampled_from(["1", "type", "include_usage", "continuous_usage_stats", "session_id", "x"]),
    st.one_of(SCALARS, LISTS),
    max_size=3,
)
VALUES = st.one_of(SCALARS, LISTS, OBJECTS)

# Values that are right for a field, so that bodies are accepted often enough to say something.
RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.1, 2),
    "temperature": st.one_of(st.integers(0, 2), st.floats(0, 2)),
    "top_p": st.floats(0.1, 1),
    "top_k": st.integers(-1, 50),
    "min_p": st.floats(0, 1),
    "logit_bias": st.dictionaries(st.sampled_from(["1", "7"]), st.integers(-100, 100)),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), max_size=6)),
    "stop_token_ids": st.lists(st.integers(0, 9), max_size=3),
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, 4),
    "max_tokens": st.one_of(st.none(), st.integers(0, 40)),
    "max_completion_tokens": st.one_of(st.none(), st.integers(0, 40)),
    "skip_special_tokens": st.booleans(),
    "spaces_between_special_tokens": st.booleans(),
    "allowed_token_ids": st.lists(st.integers(0, 9), min_size=1, max_size=3),
    "bad_words": st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries(
        {}, optional={"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}
    ),
    "stream_interval": st.integers(1, 9),
    "priority": st.integers(-5, 5),
    "request_id": st.text(max_size=5),
    "session_id": st.text(max_size=5),
    "cache_salt": st.text("ab@é", min_size=1, max_size=5),
    "vllm_xargs": st.dictionaries(
        st.sampled_from(["session_id", "x"]),
        st.one_of(st.integers(0, 3), st.just("s"), st.lists(st.floats(0, 1), max_size=2)),
    ),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    "user": st.text(max_size=3),
    "use_beam_search": st.booleans(),
    "echo": st.booleans(),
    "n": st.integers(0, 2),
    "logprobs": st.one_of(st.booleans(), st.none()),
    "top_logprobs": st.sampled_from([None, 0, 1]),
    "add_generation_prompt": st.booleans(),
    "continue_final_message": st.booleans(),
    "tools": st.none(),
    "tool_choice": st.sampled_from([None, "none", "auto"]),
    "parallel_tool_calls": st.booleans(),
    "suffix": st.none(),
    "add_special_tokens": st.booleans(),
    "model": st.sampled_from(["demo", None, "other"]),
    "store": VALUES,
    "metadata": VALUES,
    "service_tier": VALUES,
    "safety_identifier": VALUES,
    "prompt_cache_key": VALUES,
    "unknown": VALUES,
    "best_of": st.just(1),
    "length_penalty": st.just(1.0),
    "truncate_prompt_tokens": st.just(3),
    "structured_outputs": st.just({"regex": "a"}),
}


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(RIGHT)), max_size=6, unique=True))
    wrong = draw(st.integers(0, 3)) == 0
    return {name: draw(VALUES if wrong and draw(st.booleans()) else RIGHT[name]) for name in names}


PROMPTS = st.one_of(
    st.sampled_from(["x", "", None, ["x"], [[1, 2]], [], True, 5]),
    st.lists(st.integers(-1, 3000), max_size=4),
)


def encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


@pytest.mark.vllm
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize(("most", "count", "taken"), [(3, 3, True), (3, 4, False), (None, 9, True)])
def test_more_stop_strings_than_vllm_takes_are_left_to_it(
    path: str, most: int | None, count: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VLLM_MAX_STOP_STRINGS, where the release has it: vLLM's own code words the refusal."""
    pytest.importorskip("vllm")
    from scalellm_plugins.frontends.routes import Asked

    from .lane_parts import bench

    route = bench().routes[path]
    monkeypatch.setattr(route, "max_stops", most)
    body = {"messages": MESSAGES} if path == CHAT else {"prompt": "x"}
    body["stop"] = [str(number) for number in range(count)]
    assert (route.read(encoded(body), Asked(), "fallback") is not None) == taken
    # One string is no list: it is never too many.
    assert route.read(encoded({**body, "stop": "abcdef"}), Asked(), "fallback") is not None


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@settings(max_examples=1500)
@given(fields(), st.sampled_from([CHAT, COMPLETION]), PROMPTS)
@example({"stop": ["a"] * 5}, CHAT, "x")
@example({"stop": ["a"] * 5}, COMPLETION, "x")
@example({"stop": [""]}, CHAT, "x")
@example({"max_tokens": None, "echo": False}, COMPLETION, "x")
def test_what_is_accepted_means_the_same_to_vllm(
    body: dict[str, Any], path: str, prompt: Any
) -> None:
    pytest.importorskip("vllm")
    from vllm.exceptions import VLLMError

    from scalellm_plugins.frontends.routes import Asked

    from .lane_parts import bench

    route = bench().routes[path]
    body = {**body, **({"messages": MESSAGES} if path == CHAT else {"prompt": prompt})}
    ask = route.read(encoded(body), Asked(), "fallback")
    if ask is None:
        return
    # vLLM refuses some of what decodes; then so must what follows.
    try:
        theirs = route.request_class(**json.loads(encoded(body)))
    except (ValueError, VLLMError):
        assert _refused(route, ask), f"vLLM refuses {body}"
        return
    assert bool(ask.kind) == bool(theirs.stream)
    if theirs.stream:
        from vllm.entrypoints.serve.utils.api_utils import should_include_usage

        assert ask.kind == should_include_usage(theirs.stream_options, False)
    ours = route.request(ask)
    for name in type(theirs).model_fields:
        if name in ("request_id", "stream_options", "response_format", "max_tokens"):
            continue  # checked above and below, or made into something else by vLLM
        mine, vllms = getattr(ours, name), getattr(theirs, name)
        # null or left out, an empty list or false: nothing is asked for.
        nothing = name in ("logprobs", "top_logprobs", "stop", "stop_token_ids")
        if name == "tool_choice":
            assert {mine, vllms} <= {None, "none"}
            continue
        assert mine == vllms or (nothing and not mine and not vllms), name
    if "request_id" in body:
        assert ask.request_id.endswith(theirs.request_id)
    try:
        expected = theirs.to_sampling_params(30, route.handler.default_sampling_params)
    except (ValueError, VLLMError) as refusal:
        with pytest.raises(type(refusal), match=re.escape(str(refusal))):
            ours.to_sampling_params(30, route.handler.default_sampling_params)
        return
    assert ours.to_sampling_params(30, route.handler.default_sampling_params) == expected


def _refused(route: Any, ask: Any) -> bool:
    """Whether the lane finds no prompt, or vLLM's own checks refuse the request."""
    from .lane_parts import bench

    plan = route.plan(ask)
    if plan is None:
        return True
    ids = plan if isinstance(plan, list) else plan.encode()
    return bench().lane.makers[route.path].make(ask, ids, None) is None


CHAT_DECODER = bodies.chat_decoder(())
COMPLETION_DECODER = bodies.completion_decoder(())


@pytest.mark.parametrize(
    "part",
    [
        b'"temperature": NaN',
        b'"temperature": Infinity',
        b'"temperature": 1e999',
        b'"temperature": "1"',
        b'"temperature": ' + b"9" * 400,
        b'"max_tokens": 1.5',
        b'"max_tokens": 3.0',
        b'"max_tokens": true',
        b'"seed": 9223372036854775808',
        b'"priority": null',
        b'"user": "\\ud800"',
        b'"user": "\xff"',
        b'"stop": [1]',
        b'"stream": "true"',
        b'"stream": 1',
        b'"stream_options": {"include_usage": true, "other": 1}',
        b'"stream_interval": 0',
        b'"vllm_xargs": {"x": {}}',
        b'"vllm_xargs": {"x": true}',
        b'"cache_salt": ""',
        b'"cache_salt": "a/b"',
        b'"n": 2',
        b'"n": true',
        b'"tools": []',
        b'"response_format": {"type": "json_object"}',
        b'"response_format": {"type": "text", "x": 1}',
        b'"unknown": null',
        b'"temperature": "x", "temperature": 1',
    ],
)
@pytest.mark.parametrize("route", ["chat", "completion"])
def test_what_the_lane_cannot_know_the_meaning_of_is_declined(part: bytes, route: str) -> None:
    import msgspec

    head, decoder = {
        "chat": (b'{"messages": [], ', CHAT_DECODER),
        "completion": (b'{"prompt": "x", ', COMPLETION_DECODER),
    }[route]
    with pytest.raises((msgspec.MsgspecError, UnicodeDecodeError)):
        decoder.decode(head + part + b"}")


def test_the_last_of_two_equal_keys_counts() -> None:
    """As Python's json module, with which vLLM's server reads bodies, has it."""
    raw = b'{"prompt": "a", "prompt": "b", "top_k": 1, "top_k": 2}'
    body = COMPLETION_DECODER.decode(raw)
    assert {"prompt": body.prompt, "top_k": body.top_k} == json.loads(raw)


def test_fields_follow_the_release() -> None:
    """What vLLM has learnt to use is not ignored, and what it does not know is not handled."""
    import msgspec

    decoder = bodies.chat_decoder({"messages", "stream", "metadata"})
    decoder.decode(b'{"messages": [], "stream": true, "store": 1}')
    for unknown in (b'"metadata": {}', b'"top_k": 1'):
        with pytest.raises(msgspec.ValidationError):
            decoder.decode(b'{"messages": [], ' + unknown + b"}")


@pytest.mark.parametrize("field", ["use_beam_search", "echo"])
def test_plain_bodies_are_told_from_others(field: str) -> None:
    assert bodies.is_plain(CHAT_DECODER.decode(b'{"messages": []}'))
    body = CHAT_DECODER.decode(b'{"messages": [], "%b": true}' % field.encode())
    assert not bodies.is_plain(body)
    assert not bodies.is_plain(CHAT_DECODER.decode(b'{"messages": [], "logprobs": true}'))
