"""What the refused are told, and when they may come again."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.frontends.limits import (
    GAUGES,
    PROMPT_TOKENS,
    QUEUED_PROMPT_TOKENS,
    REQUESTS,
    DrainRate,
    Refusal,
)

NOTHING = [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("rate", "used", "added", "seconds"),
    [
        (None, 10, 1, 1),
        (0.0, 10, 1, 60),
        (0.001, 10, 1, 60),
        (0.5, 10, 1, 2),
        (1000.0, 10, 1, 1),
        (10.0, 10, 245, 25),
        (10.0, 10, 10_000, 60),
    ],
)
def test_retry_after_is_when_there_is_room(
    rate: float | None, used: int, added: int, seconds: int
) -> None:
    assert Refusal("a", PROMPT_TOKENS, 10, used, added).retry_after(rate) == seconds


@given(
    rate=st.none() | st.floats(0, 1e12, allow_nan=False),
    used=st.integers(0, 10**12),
    added=st.integers(0, 10**12),
    limit=st.integers(1, 10**12),
)
def test_retry_after_is_a_number_of_seconds_from_1_to_60(
    rate: float | None, used: int, added: int, limit: int
) -> None:
    assert 1 <= Refusal(None, REQUESTS, limit, used, added).retry_after(rate) <= 60


def test_refusals_name_the_limit_its_value_and_where_it_is_set() -> None:
    mine = Refusal("acme", QUEUED_PROMPT_TOKENS, 500, 400, 300)
    document = json.loads(mine.body(7))
    assert mine.status == 429
    assert document["error"] | {"message": ""} == {
        "message": "",
        "type": "Too Many Requests",
        "param": None,
        "code": 429,
    }
    for part in ("'acme'", "400", "300", "500", "max_queued_prompt_tokens", "7 s"):
        assert part in document["error"]["message"]
    servers = Refusal(None, REQUESTS, 64, 64, 1)
    assert servers.status == 503
    text = json.loads(servers.body(1))["error"]["message"]
    assert "--scalellm.frontend.max_requests" in text
    assert "64" in text
    anthropic = json.loads(mine.body(7, anthropic=True))
    assert anthropic["type"] == "error"
    assert anthropic["error"]["type"] == "rate_limit_error"


def test_the_drain_rate_follows_what_leaves_and_not_the_quiet() -> None:
    def rates() -> list[float | None]:
        return [drain.rate(gauge) for gauge in range(len(GAUGES))]

    drain = DrainRate(0.0, NOTHING)
    drain.sample(1.0, NOTHING, [1, 0, 0, 0])
    assert rates() == [None] * 4, "nothing has left yet: the first may take a minute"
    drain.sample(2.0, [10, 10, 100, 100], [1, 0, 5, 0])
    requests, *others = rates()
    assert others == [10, 100, 100]
    assert requests == pytest.approx(5, abs=0.3), "10 in two seconds"
    for second in range(3, 40):
        drain.sample(float(second), [10, 10, 100, 100], NOTHING)
    assert rates() == [requests, *others], "a quiet minute is not a slow one"
    for second in range(40, 200):
        drain.sample(float(second), [10 + 2 * (second - 39)] * 2 + [100, 100], [1, 1, 1, 1])
    requests, _, tokens, _ = rates()
    assert requests == pytest.approx(2, abs=0.01)
    assert tokens is not None
    assert tokens < 0.1
