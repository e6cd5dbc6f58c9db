"""A request made from a pattern is the one that vLLM's own checks would have made."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm.exceptions import VLLMError
from vllm.inputs import tokens_input

from scalellm_plugins.engine.holding import HOLD
from scalellm_plugins.frontends import requests
from scalellm_plugins.frontends.bound import Bound
from scalellm_plugins.frontends.requests import RequestMaker
from scalellm_plugins.frontends.routes import Asked
from scalellm_plugins.frontends.tenants import Tenant
from scalellm_plugins.scheduling.terms import DEADLINE, TENANT, TPOT, TTFT, WEIGHT

from .lane_parts import CHAT, COMPLETION, bench

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

# Few values for each, so that patterns are met again, with the lists and mappings among them.
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.0, 1, 1.0, 0.5]),
        "top_k": st.sampled_from([0, 1, 5]),
        "seed": st.sampled_from([0, 1, None]),
        "stop": st.sampled_from(["a", ["a"], ["a", "b"], []]),
        "stop_token_ids": st.sampled_from([[], [1], [1, 2]]),
        "logit_bias": st.sampled_from([{"1": 1}, {"1": 1.0, "2": -1}]),
        "bad_words": st.sampled_from([[], ["a"]]),
        "allowed_token_ids": st.sampled_from([[1, 2], [3]]),
        "ignore_eos": st.booleans(),
        "min_tokens": st.sampled_from([0, 1, 4]),
        "max_tokens": st.sampled_from([None, 0, 1, 3, 5, 2047, 2048, 2049, 10**6]),
        "vllm_xargs": st.sampled_from([{"x": 1}, {"x": 1.0}, {"x": [1, "a"]}, {"session_id": "s"}]),
        "include_stop_str_in_output": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "stream": st.booleans(),
        "stream_interval": st.sampled_from([1, 2, None]),
        "priority": st.sampled_from([0, 3]),
        "cache_salt": st.sampled_from(["a", "b"]),
        "session_id": st.sampled_from(["a", "b"]),
        "user": st.sampled_from(["a", "b"]),
    },
)
LENGTHS = st.sampled_from([1, 2, 5, 2040, 2046, 2047])


def upstream(path: str, ask: Any, body: dict[str, Any], ids: list[int], hold: Any) -> Any:
    """The request that vLLM's handlers would have made; None where they refuse it."""
    route = bench().routes[path]
    made = route.request_class(**body)
    wanted = made.max_tokens
    if wanted is not None and wanted > route.max_model_len - len(ids):
        return None  # clamped or refused, by release: vLLM's own code does either
    try:
        most = route._get_max_tokens(
            route.max_model_len,
            wanted,
            len(ids),
            route.handler.default_sampling_params,
            route.handler.override_max_tokens,
        )
        params = made.to_sampling_params(most, route.handler.default_sampling_params)
        if hold is not None:
            params.extra_args = {**(params.extra_args or {}), HOLD: hold}
        return bench().client.input_processor.process_inputs(
            ask.engine_id,
            tokens_input(ids, cache_salt=made.cache_salt),
            params,
            supported_tasks=("generate",),
            arrival_time=ask.arrival_time,
            priority=made.priority,
            session_id=ask.session_id,
        )
    except (ValueError, VLLMError):
        return None


def content(request: Any) -> dict[str, Any]:
    """Every field but the ids that are made at random."""
    return {
        name: getattr(request, name)
        for name in request.__struct_fields__
        if name not in ("request_id", "external_req_id")
    }


def maker(path: str) -> RequestMaker:
    return RequestMaker(bench().client, bench().routes[path], ("generate",))


def ask_for(path: str, body: dict[str, Any], **headers: Any) -> Any:
    ask = bench().routes[path].read(json.dumps(body).encode(), Asked(**headers), "name")
    assert ask is not None
    return ask


def full(path: str, body: dict[str, Any]) -> dict[str, Any]:
    return {**body, **({"messages": []} if path == CHAT else {"prompt": "x"})}


@given(
    path=st.sampled_from([CHAT, COMPLETION]),
    asked=st.lists(
        st.tuples(PARAMETERS, LENGTHS, st.sampled_from([None, 0, 4])), min_size=1, max_size=8
    ),
)
def test_requests_are_those_that_vllm_makes(path: str, asked: list[Any]) -> None:
    made = maker(path)
    # Twice: the second time everything that was accepted is a pattern.
    for parameters, length, hold in asked + asked:
        body = full(path, parameters)
        ask = ask_for(path, body)
        ids = [3 + number % 100 for number in range(length)]
        ours = made.make(ask, ids, hold)
        theirs = upstream(path, ask, copy.deepcopy(body), ids, hold)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert content(ours) == content(theirs)
            assert ours.external_req_id == theirs.request_id
            assert ours.request_id.startswith(theirs.request_id + "-")


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_what_is_the_requests_own_does_not_come_from_the_pattern(path: str) -> None:
    made = maker(path)
    for number, header in enumerate([None, 7, None]):
        own: dict[str, Any] = {
            "priority": number,
            "cache_salt": f"salt {number}",
            "session_id": f"session {number}",
            "max_tokens": number + 1,
        }
        body = full(path, {"stop": ["a"], **own})
        ask = (
            bench()
            .routes[path]
            .read(json.dumps(body).encode(), Asked(priority=header), f"name {number}")
        )
        assert ask is not None
        ask.arrival_time = float(number)
        got = made.make(ask, [5] * (number + 1), None)
        assert got.priority == (number if header is None else header)
        assert (got.cache_salt, got.session_id) == (own["cache_salt"], own["session_id"])
        assert (got.prompt_token_ids, got.arrival_time) == ([5] * (number + 1), float(number))
        assert got.sampling_params.max_tokens == number + 1
        assert f"name {number}" in got.external_req_id
    assert len(made._patterns) == 1


def test_a_pattern_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what makes requests cheap; with lists among the parameters, too."""
    made = maker(CHAT)
    calls: list[Any] = []
    process = bench().client.input_processor.process_inputs

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return process(*args, **kwargs)

    monkeypatch.setattr(bench().client.input_processor, "process_inputs", counted)
    for parameters in ({"top_k": 3}, {"stop": ["a"]}, {"logit_bias": {"1": 1}}):
        for length in (3, 4, 5):
            body = full(CHAT, {**parameters, "max_tokens": length, "user": str(length)})
            assert made.make(ask_for(CHAT, body), [5] * length, None) is not None
    assert len(calls) == 3


def test_token_ids_of_clients_are_checked_each_time() -> None:
    """An id outside of the vocabulary would stop the engine."""
    made = maker(COMPLETION)
    good = ask_for(COMPLETION, {"prompt": [5, 6]})
    assert made.make(good, [5, 6], None) is not None
    bad = ask_for(COMPLETION, {"prompt": [5, 10**6]})
    assert made.make(bad, [5, 10**6], None) is None
    assert made.make(ask_for(COMPLETION, {"prompt": [-1]}), [-1], None) is None


def test_requests_are_independent() -> None:
    made = maker(CHAT)
    body = full(CHAT, {"max_tokens": 5})
    first = made.make(ask_for(CHAT, body), [1, 2], None)
    second = made.make(ask_for(CHAT, body), [3, 4], None)
    first.client_index, first.priority, first.session_id = 7, 9, "changed"
    first.prompt_token_ids.append(0)
    third = made.make(ask_for(CHAT, body), [5, 6], None)
    for other, ids in ((second, [3, 4]), (third, [5, 6])):
        assert other.prompt_token_ids == ids
        assert (other.client_index, other.priority, other.session_id) == (0, 0, None)
    assert len({one.request_id for one in (first, second, third)}) == 3


def test_a_tenant_is_part_of_the_pattern() -> None:
    """One tenant's requests would be counted as another's; an entry that changed would not."""
    made = maker(CHAT)
    ask = ask_for(CHAT, full(CHAT, {}))
    for name, weight in [("a", 1.0), ("b", 1.0), ("a", 1.0), ("a", 2.0), (None, 0.0)]:
        bound = None if name is None else Bound(Tenant(name=name, weight=weight))
        params = made.make(ask, [1, 2], None, bound).sampling_params
        assert params.extra_args == (name and {TENANT: name, WEIGHT: weight})


SAID = [{}, {DEADLINE: 5, "mine": 1}, {DEADLINE: 6, "mine": 1}, {TENANT: "b", TTFT: 7}, {WEIGHT: 3}]


@pytest.mark.parametrize("tenant", [None, Tenant(name="acme", ttft_ms=9)])
@pytest.mark.parametrize("hold", [None, 0])
def test_terms_are_the_requests_own(tenant: Tenant | None, hold: int | None) -> None:
    """They differ from request to request: neither another's pattern may show, nor one for each
    of them fill the memory."""
    made = maker(CHAT)
    bound = tenant and Bound(tenant)
    for said in [*SAID, *SAID]:
        for headers in (None, {TPOT: 2.5}, {DEADLINE: 8}):
            ask = ask_for(CHAT, full(CHAT, {"vllm_xargs": said}), terms=headers)
            got = made.make(ask, [1, 2], hold, bound).sampling_params.extra_args
            expected = said | (headers or {})
            if tenant is not None:
                expected = {TTFT: 9.0, **expected, TENANT: "acme", WEIGHT: 1.0}
            if hold is not None:
                expected = {**expected, HOLD: hold}
            assert (got or {}) == expected
    assert len(made._patterns) == 3, "other extra arguments, an empty mapping, none"


@pytest.mark.parametrize("said", [{WEIGHT: 0}, {WEIGHT: "2"}, {"scalellm_wieght": 2}, {HOLD: 0}])
def test_terms_that_are_not_valid_are_vllms_own_business(said: dict[str, Any]) -> None:
    """There they are refused (test_terms_server.py)."""
    raw = json.dumps(full(CHAT, {"vllm_xargs": said})).encode()
    assert bench().routes[CHAT].read(raw, Asked(), "name") is None


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_tenants_class_and_salt(path: str) -> None:
    made = maker(path)
    acme = Bound(Tenant(name="acme", priority=7, isolate_prefix=True))
    for _ in range(2):  # checked by vLLM, and from the pattern
        for said, header, expected in [({}, None, 7), ({"priority": 3}, None, 3), ({}, -2, -2)]:
            for salt in (None, "own"):
                body = full(path, {**said, **({"cache_salt": salt} if salt else {})})
                ask = ask_for(path, body, priority=header)
                got = made.make(ask, [1, 2], None, acme)
                assert (got.priority, got.cache_salt) == (expected, acme.salted(salt))


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that varies a parameter would fill the memory."""
    monkeypatch.setattr(requests, "_PATTERNS", 4)
    made = maker(CHAT)
    for number in range(20):
        assert made.make(ask_for(CHAT, full(CHAT, {"seed": number})), [1], None) is not None
        assert made.make(ask_for(CHAT, full(CHAT, {"max_tokens": number + 1})), [1], None)
        assert len(made._patterns) <= 4
        assert all(len(one.params) <= 5 for one in made._patterns.values())


def test_a_full_server_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own limits hold for the lane; its own code answers."""

    def full_up(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("too many requests")

    monkeypatch.setattr(bench().client, "check_admission", full_up)
    assert maker(CHAT).make(ask_for(CHAT, full(CHAT, {})), [1], None) is None


def test_ids_are_those_that_vllm_would_give(monkeypatch: pytest.MonkeyPatch) -> None:
    body = full(CHAT, {})
    made = [maker(CHAT).make(ask_for(CHAT, body), [1, 2], None) for _ in range(2)]
    assert {one.external_req_id for one in made} == {"chatcmpl-name"}
    assert all(re.fullmatch("chatcmpl-name-[0-9a-f]{8}", one.request_id) for one in made)
    assert made[0].request_id != made[1].request_id
    # Any other rule, such as that of VLLM_DISABLE_REQUEST_ID_RANDOMIZATION, is vLLM's to apply.
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    plain = maker(CHAT).make(ask_for(CHAT, body), [1, 2], None)
    assert (plain.request_id, plain.external_req_id) == ("chatcmpl-name", "chatcmpl-name")
