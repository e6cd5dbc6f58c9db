"""What the engine makes of a number is the request that was sent, whatever was forgotten."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins import likes
from scalellm_plugins.likes import UNNUMBERED, LikesReceived, LikesSent, LikeUnknown


class Params(msgspec.Struct):
    """As much of `SamplingParams` as is needed."""

    value: int


class Request(msgspec.Struct, array_like=True):
    """As much of `EngineCoreRequest`; a release without `session_id` and the others."""

    request_id: str
    prompt_token_ids: list[int] | None
    sampling_params: Params | None
    arrival_time: float
    priority: int = 0
    lora: str | None = None


def sent(one: LikesSent, request: Request) -> tuple[int, Any]:
    """What crosses: the number, and the whole request, or what is carried."""
    number, known = one.number(request)
    if known:
        return number, msgspec.msgpack.decode(msgspec.msgpack.encode(one.carried(request)))
    return number, msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Request)


def received(one: LikesReceived, number: int, content: Any) -> Request:
    if isinstance(content, Request):
        one.remember(number, content)
        return content
    made: Request = one.make(number, content)
    return made


ASKED = st.tuples(st.integers(0, 9), st.integers(0, 3), st.sampled_from([None, "lora"]))


@given(asked=st.lists(st.one_of(ASKED, st.none()), max_size=60), most=st.integers(1, 6))
def test_requests_arrive_as_they_were_sent(asked: list[Any], most: int) -> None:
    """At None a request could not be sent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likes, "MOST", most)
        there, here = LikesSent(Request), LikesReceived(Request)
        pool = [Params(value) for value in range(10)]
        for number, one in enumerate(asked):
            if one is None:
                there.number(Request("lost", None, pool[0], 0.0))
                there.forget()
                continue
            which, priority, lora = one
            request = Request(f"r{number}", None, pool[which], number / 2, priority, lora)
            got = received(here, *sent(there, request))
            assert got == request
            got.sampling_params.value = -1  # type: ignore[union-attr]
        assert len(there._known) <= most
        assert len(here._known) <= most


def test_the_second_is_a_number() -> None:
    there = LikesSent(Request)
    params = Params(1)
    assert there.number(Request("a", None, params, 0.0)) == (0, False)
    assert there.number(Request("b", [1], params, 2.0, 3)) == (0, True)
    assert there.number(Request("c", None, params, 0.0, lora="x")) == (1, False)
    assert there.carried(Request("b", [1], params, 2.0, 3)) == ("b", [1], 2.0, 3)


def test_numbers_that_nobody_gave() -> None:
    here = LikesReceived(Request)
    request = Request("a", None, Params(1), 0.0)
    here.remember(UNNUMBERED, request)
    assert not here._known
    here.remember(0, request)
    for number, carried in ((1, ["b", None, 0.0, 0]), (UNNUMBERED, ["b", None, 0.0, 0]), (0, [])):
        with pytest.raises(LikeUnknown, match=f"like number {number}, with {len(carried)} fields"):
            here.make(number, carried)
    with pytest.raises(LikeUnknown, match="request number 256"):
        here.remember(256, request)
