"""Terms: what is valid is read, and what is not is refused in words that say how it would be."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.errors import TermError
from scalellm_plugins.scheduling import fair, terms
from scalellm_plugins.scheduling.terms import (
    DEADLINE,
    DEFAULT,
    HEADERS,
    LONGEST_MS,
    SAID,
    TENANT,
    TPOT,
    TTFT,
    WEIGHT,
    Terms,
    in_body,
    in_headers,
)

TIMES = (DEADLINE, TTFT, TPOT)
VALID = st.fixed_dictionaries(
    {},
    optional={
        TENANT: st.text(
            st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=terms.LONGEST_NAME
        ),
        WEIGHT: st.one_of(
            st.integers(1, 10**6), st.floats(min_value=terms.LIGHTEST, max_value=terms.HEAVIEST)
        ),
        **{name: st.one_of(st.integers(1, 10**9), st.floats(1e-3, LONGEST_MS)) for name in TIMES},
    },
)
NO_NUMBERS = [0, -1, 0.0, -0.5, math.nan, math.inf, -math.inf, True, False, None, "2", "", [2], {}]
TOO_MUCH = [10**10, 1e10, 10**400]


@given(VALID)
def test_what_is_valid_is_the_same_in_bodies_and_in_headers(said: dict[str, Any]) -> None:
    assert in_body({**said, "mine": 1}) == said
    headers = [
        (header, (value if name == TENANT else json.dumps(value)).encode())
        for header, name in HEADERS.items()
        if (value := said.get(name)) is not None
    ]
    got = in_headers([(b"accept", b"*/*"), *headers])
    assert {name: got[name] for name in got if name != TENANT} == pytest.approx(
        {name: float(said[name]) for name in said if name != TENANT}
    )
    assert got.get(TENANT) == said.get(TENANT)


@given(VALID)
def test_the_engine_reads_them_in_seconds(said: dict[str, Any]) -> None:
    read = Terms.of({**said, "scalellm_hold": 3, "scalellm_max_running": 2})
    assert read.tenant == said.get(TENANT, DEFAULT)
    assert read.weight == said.get(WEIGHT)
    for name, seconds in zip(TIMES, (read.deadline_s, read.ttft_s, read.tpot_s), strict=True):
        assert seconds == (said[name] / 1000 if name in said else None)


def test_who_says_nothing() -> None:
    assert Terms.of(None) == Terms.of({}) == Terms.of({"mine": 1}) == Terms()
    assert in_body(None) == in_body({"mine": 1}) == in_headers([(b"x-vllm-priority", b"1")]) == {}


@pytest.mark.parametrize("name", [WEIGHT, *TIMES])
@pytest.mark.parametrize("value", NO_NUMBERS + TOO_MUCH, ids=lambda value: repr(value)[:12])
def test_numbers_that_are_none(name: str, value: Any) -> None:
    for read in (in_body, Terms.of):
        with pytest.raises(TermError) as error:
            read({name: value})
        assert "is not valid. Valid: " in str(error.value)
        assert name in error.value.field
        assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    "value", ["", " ", "\t", "a\nb", "\x7f", "\ud800", "x" * 257, 3, True, None, ["a"]]
)
def test_names_that_are_none(value: Any) -> None:
    """Half a surrogate pair cannot be sent to the engine; a line break would forge the log."""
    with pytest.raises(TermError) as error:
        in_body({TENANT: value})
    assert "Valid: text of 1 to 256 printable characters" in str(error.value)
    assert len(str(error.value)) < 250
    str(error.value).encode()


@pytest.mark.parametrize(
    "value",
    ["", "x", "nan", "inf", "-1", "0", "1_000", "0x10", "1,5", "1e999", "\u0661", "5 ms", "."],
)
def test_numbers_in_headers_that_are_none(value: str) -> None:
    with pytest.raises(TermError) as error:
        in_headers([(b"x-scalellm-ttft-ms", value.encode())])
    assert str(error.value).startswith(f"X-Scalellm-TTFT-Ms: {value!r} is not valid. Valid: ")
    assert error.value.field == "X-Scalellm-TTFT-Ms"


def test_headers_are_read_as_vllm_reads_them() -> None:
    """The first of several; spaces around it are not its own. Names are text, as in bodies."""
    first, second = (b"x-scalellm-weight", b" 2 "), (b"x-scalellm-weight", b"3")
    assert in_headers([first, second]) == {WEIGHT: 2.0}
    for raw in ("müller".encode(), "müller".encode("latin-1")):
        assert in_headers([(b"x-scalellm-tenant", raw)]) == {TENANT: "müller"}


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("scalellm_ttft", TTFT),
        ("scalellm_wieght", WEIGHT),
        ("scalellm_deadline", DEADLINE),
        ("scalellm_hold", None),
        ("scalellm_max_running", None),
        ("scalellm_", None),
    ],
)
def test_a_name_that_does_not_exist_is_a_mistake(name: str, closest: str | None) -> None:
    """Also one that only the tenants file may say, or the lane itself."""
    with pytest.raises(TermError) as error:
        in_body({name: 5})
    said, _, valid = str(error.value).partition(" Valid: ")
    assert said == f"vllm_xargs.{name}: there is no such name."
    assert sorted(valid.split(", ")) == sorted(SAID)
    if closest is not None:
        assert valid.startswith(closest)
    with pytest.raises(TermError, match="X-Scalellm-Ttl-Ms: there is no such name"):
        in_headers([(b"x-scalellm-ttl-ms", b"5")])


def test_every_term_has_a_header() -> None:
    assert sorted(HEADERS.values()) == sorted(SAID)
    assert all(header.startswith(terms.HEADER_PREFIX) for header in HEADERS)
    assert all(name.startswith(terms.PREFIX) for name in SAID)


def test_old_names_are_still_where_they_were() -> None:
    assert (fair.TENANT, fair.WEIGHT, fair.DEFAULT) == (TENANT, WEIGHT, DEFAULT)
