"""A step as columns: what is encoded is decoded; anything else is an error that says so."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scalellm_plugins.messages import End, Step, StepCorrupted, decode_step, encode_step

NUMBER = st.integers(0, 2**62)
COLUMNS = st.lists(st.tuples(NUMBER, NUMBER), max_size=300)
ENDS = st.lists(
    st.builds(End, NUMBER, st.lists(NUMBER, max_size=3), st.integers(0, 4), st.none() | NUMBER),
    max_size=3,
)


@given(st.floats(), COLUMNS, st.none() | ENDS, st.none() | st.binary(max_size=100))
def test_what_is_encoded_is_decoded(
    timestamp: float, columns: Any, ends: list[End] | None, general: bytes | None
) -> None:
    slots, tokens = [slot for slot, _ in columns], [token for _, token in columns]
    data = bytearray(encode_step(Step(timestamp, slots, tokens, ends, general)))
    step = decode_step(memoryview(data))
    data[:] = bytes(len(data))  # the ring's memory is written over
    assert step.timestamp == timestamp or (math.isnan(step.timestamp) and math.isnan(timestamp))
    assert (step.slots, step.tokens, step.ends) == (slots, tokens, ends)
    assert step.general == general


def test_slots_that_have_not_changed_take_no_room() -> None:
    tokens = list(range(256))
    same, new = (encode_step(Step(1.0, slots, tokens)) for slots in (None, tokens))
    assert len(same) < 0.6 * len(new)
    assert decode_step(same).slots is None


def test_columns_of_different_lengths() -> None:
    with pytest.raises(StepCorrupted, match="2 slots and 1 tokens"):
        decode_step(encode_step(Step(1.0, [1, 2], [3])))


def test_a_step_that_is_cut_off_or_followed_by_more() -> None:
    whole = encode_step(Step(1.0, [1, 2], [300, 4], [End(5, [6], 1, None)], b"rest"))
    for size in range(len(whole)):
        with pytest.raises(StepCorrupted, match=f"step of {size} bytes"):
            decode_step(whole[:size])
    with pytest.raises(StepCorrupted, match=f"step of {len(whole) + 1} bytes"):
        decode_step(whole + b"x")


def decoded(data: bytes) -> Step | StepCorrupted:
    """Anything else that is raised is a failure."""
    try:
        return decode_step(data)
    except StepCorrupted as error:
        return error


@given(st.binary(max_size=80))
@example(b"\xdd\xff\xff\xff\xff")  # an array that says it has 2^32 elements
@example(b"\x94\x01\xdd\xff\xff\xff\xff")
@example(b"\x92" * 2000)
@example(msgspec.msgpack.encode([1.0, ["1"], [2]]))
def test_a_step_of_any_bytes(data: bytes) -> None:
    step = decoded(data)
    if isinstance(step, StepCorrupted):
        assert f"step of {len(data)} bytes" in str(step) or "slots and" in str(step)
    else:
        assert step.slots is None or len(step.slots) == len(step.tokens)


@given(st.data())
def test_a_step_of_changed_bytes(data: st.DataObject) -> None:
    whole = bytearray(encode_step(Step(1.0, [1, 2], [3, 70_000], None, b"rest")))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] = data.draw(st.integers(0, 255))
    assert isinstance(decoded(bytes(whole)), Step | StepCorrupted)
