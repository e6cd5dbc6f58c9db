"""Limits of tenants: what is counted, and who is let in."""

from __future__ import annotations

import math
from typing import Any

import pytest

from scalellm_plugins.scheduling.policy import Work
from scalellm_plugins.scheduling.quotas import Quotas
from scalellm_plugins.scheduling.tenant_limits import NONE, TenantLimits
from scalellm_plugins.scheduling.terms import (
    KV_CEILING,
    KV_FLOOR,
    MAX_RUNNING,
    TOKENS_PER_MINUTE,
)

BLOCKS, BLOCK = 100, 10


def work(name: str, tenant: str = "a", prompt: int = 10, most: int = 10) -> Work:
    made = Work(name, prompt=prompt, most=most)
    made.tenant = tenant
    return made


def quotas(**limits: dict[str, Any]) -> Quotas:
    made = Quotas(BLOCKS, BLOCK)
    for tenant, fields in limits.items():
        made.note(tenant, TenantLimits(**fields), 0.0)
    return made


def run(made: Quotas, name: str, tenant: str, blocks: int, now: float = 0.0) -> Work:
    one = work(name, tenant)
    made.arrived(one, now)
    made.started(one, blocks, now)
    return one


# What a request says


def test_limits_are_read_and_nonsense_is_none() -> None:
    extra = {MAX_RUNNING: 3, KV_FLOOR: 0.25, KV_CEILING: 0.5, TOKENS_PER_MINUTE: 600, "other": 1}
    assert TenantLimits.of(extra) == TenantLimits(
        max_running=3, floor=0.25, ceiling=0.5, tokens_per_minute=600
    )
    assert TenantLimits.of(None) is TenantLimits.of({"other": 1}) is NONE
    for value in (True, "3", None, -1, math.nan, math.inf):
        extra = dict.fromkeys((MAX_RUNNING, KV_FLOOR, KV_CEILING, TOKENS_PER_MINUTE), value)
        assert TenantLimits.of(extra) == NONE, value
    assert TenantLimits.of({KV_FLOOR: 0.5, KV_CEILING: 0.2}).floor == 0.2


def test_without_limits_nothing_is_looked_at() -> None:
    made = Quotas(BLOCKS, BLOCK)
    assert not made.note("a", NONE, 0.0)
    assert not made.limited
    assert not made._tenants
    assert made.refusal(work("x", prompt=10**6), 0.0) is None
    assert made.allows(work("x"), 1000, 0, 0.0)
    assert made.note("a", TenantLimits(max_running=1), 0.0)
    assert not made.note("a", TenantLimits(max_running=1), 0.0)
    assert made.limited
    assert not made.counts_blocks
    assert made.note("a", NONE, 0.0)
    assert not made.limited, "the last told wins"


# Sequences and ceilings


def test_sequences_at_a_time() -> None:
    made = quotas(a={"max_running": 2})
    first = run(made, "1", "a", 1)
    run(made, "2", "a", 1)
    assert not made.allows(work("3"), 1, 98, 0.0)
    assert made.allows(work("3", "b"), 1, 98, 0.0)
    made.stopped(first, 0.0)
    assert made.allows(first, 1, 99, 0.0), "a preempted one makes room"
    made.ended(first, 0.0)
    made.ended(first, 0.0)
    assert made.running("a") == 1, "to end twice is to end"


def test_a_ceiling_holds_as_work_grows_but_for_the_only_one() -> None:
    made = quotas(a={"ceiling": 0.3})
    first = run(made, "1", "a", 20)
    assert made.allows(work("2"), 10, 80, 0.0)
    assert not made.allows(work("2"), 11, 80, 0.0)
    second = run(made, "2", "a", 10)
    assert made.over_ceiling() is None
    made.holds(first, 21)
    assert made.over_ceiling() == "a"
    made.stopped(second, 0.0)
    assert made.over_ceiling() is None
    assert not made.allows(second, 10, 79, 0.0), "it does not come back at once"
    made.holds(first, 40)
    assert made.over_ceiling() is None, "the only one goes on"
    made.stopped(first, 0.0)
    assert made.allows(first, 40, 100, 0.0), "and may come back when it was preempted"


def test_a_prompt_that_never_fits_is_refused_with_what_would() -> None:
    made = quotas(a={"ceiling": 0.3})
    assert made.refusal(work("1", prompt=299), 0.0) is None
    refused = made.refusal(work("1", prompt=300), 0.0)
    assert refused is not None
    assert (refused.status, refused.retry_after_s) == (400, None)
    assert "at most 299 tokens" in refused.message
    assert "31 KV blocks" in refused.message


# Floors


def test_others_leave_a_floor_free_while_its_tenant_is_active() -> None:
    made = quotas(a={"floor": 0.4})
    run(made, "b1", "b", 50)
    assert made.allows(work("b2", "b"), 50, 50, 1000.0), "nobody needs it"
    one = work("a1", "a")
    made.arrived(one, 1000.0)
    assert not made.allows(work("b2", "b"), 11, 50, 1000.0)
    assert made.allows(work("b2", "b"), 10, 50, 1000.0)
    made.started(one, 30, 1000.0)
    assert made.allows(work("b2", "b"), 10, 20, 1000.0), "30 of 40 are taken"
    assert not made.allows(work("b2", "b"), 11, 20, 1000.0)
    made.ended(one, 1000.0)
    assert not made.allows(work("b2", "b"), 11, 50, 1060.0), "for a minute it is kept free"
    assert made.allows(work("b2", "b"), 11, 50, 1060.1)


def test_a_floor_is_held_after_work_that_never_ran() -> None:
    made = quotas(a={"floor": 0.4})
    run(made, "b1", "b", 50)
    gone = work("a1")
    made.arrived(gone, 0.0)
    made.ended(gone, 100.0)
    assert not made.allows(work("b2", "b"), 11, 50, 159.0)


def test_two_that_come_back_do_not_wait_for_each_others_floors() -> None:
    """Somebody else has grown into both: what is left is for whoever is within its own."""
    made = quotas(a={"floor": 0.5}, b={"floor": 0.5})
    run(made, "c1", "c", 90)
    for name in "ab":
        made.arrived(work(name, name), 1000.0)
    for name in "ab":
        assert made.allows(work(name, name), 5, 10, 1000.0)
    assert not made.allows(work("c2", "c"), 1, 10, 1000.0)


def test_what_is_promised_is_not_free() -> None:
    """A long prompt takes its blocks chunk by chunk; others must not be let in on them."""
    made = quotas(a={"floor": 0.4})
    made.arrived(work("a1", "a"), 0.0)
    one = work("b1", "b")
    made.started(one, 50, 0.0, held=10)
    assert made.used("b") == 50
    assert not made.allows(work("c1", "c"), 11, 90, 0.0)
    assert made.allows(work("c1", "c"), 10, 90, 0.0)
    made.holds(one, 50)
    assert made.allows(work("c1", "c"), 10, 50, 0.0)


def test_who_has_most_beyond_its_floor_gives_way() -> None:
    made = quotas(a={"floor": 0.4}, b={"floor": 0.3})
    b = run(made, "b1", "b", 45)
    run(made, "c1", "c", 10)
    run(made, "b2", "b", 45)
    one = work("a1", "a")
    made.arrived(one, 0.0)
    assert made.gives_way(one, 41, 0, 0.0) is None, "beyond its floor it has no right to any"
    assert made.gives_way(one, 40, 0, 0.0) == "b"
    made.stopped(b, 0.0)
    assert made.gives_way(one, 40, 45, 0.0) is None
    assert made.allows(one, 40, 45, 0.0)
    assert not made.allows(b, 45, 45, 0.0), "nobody comes back in its stead"


def test_floors_of_more_than_all_are_scaled() -> None:
    made = quotas(a={"floor": 0.8}, b={"floor": 0.8})
    assert made.floor_blocks() == {"a": 50, "b": 50}
    made.arrived(work("b1", "b"), 0.0)
    run(made, "a1", "a", 10)
    assert made.allows(work("a2"), 40, 90, 0.0)
    assert not made.allows(work("a2"), 41, 90, 0.0)


# Tokens per minute


def test_a_bucket_is_emptied_by_prompts_and_tokens_and_fills_up() -> None:
    made = quotas(a={"tokens_per_minute": 600})
    one = work("1", prompt=400)
    assert made.refusal(one, 0.0) is None
    assert made.tokens("a", 0.0) == 600, "to ask costs nothing"
    made.arrived(one, 0.0)
    made.made("a", 150, 0.0)
    assert made.tokens("a", 0.0) == 50
    refused = made.refusal(work("2", prompt=100), 0.0)
    assert refused is not None
    assert (refused.status, refused.retry_after_s) == (429, 5)
    assert "'a' has used up its 600 tokens per minute" in refused.message
    assert "in 5 s" in refused.message
    assert made.refusal(work("2", prompt=100), 5.0) is None
    assert made.tokens("a", 1e6) == 600, "a minute's worth is saved up, and no more"


def test_what_never_ran_costs_nothing_and_what_did_does() -> None:
    made = quotas(a={"tokens_per_minute": 600})
    waits, ran = work("1", prompt=200), work("2", prompt=200)
    for one in (waits, ran):
        made.arrived(one, 0.0)
    ran.computed = 64
    made.started(ran, 20, 0.0)
    made.ended(waits, 0.0)
    made.ended(ran, 0.0)
    assert made.tokens("a", 0.0) == 400


def test_a_prompt_longer_than_a_minutes_worth_needs_a_full_bucket() -> None:
    made = quotas(a={"tokens_per_minute": 60})
    assert made.refusal(work("1", prompt=500), 0.0) is None
    made.arrived(work("1", prompt=500), 0.0)
    refused = made.refusal(work("2", prompt=1), 0.0)
    assert refused is not None
    assert refused.retry_after_s == 441, "the debt, and one"
    refused = made.refusal(work("2", prompt=500), 0.0)
    assert refused is not None
    assert refused.retry_after_s == 500


def test_another_rate_keeps_what_was_taken() -> None:
    made = quotas(a={"tokens_per_minute": 600})
    made.arrived(work("1", prompt=500), 0.0)
    made.note("a", TenantLimits(tokens_per_minute=1200), 0.0)
    assert made.tokens("a", 0.0) == 700


def test_tenants_that_left_are_forgotten() -> None:
    """Names may be the clients' own: there is no end of them."""
    made = quotas(a={"max_running": 3}, debtor={"tokens_per_minute": 1}, floor={"floor": 0.1})
    long = run(made, "long", "debtor", 1)
    long.made = 10**6
    made.made("debtor", long.made, 0.0)
    made.ended(long, 0.0)
    for number in range(2000):
        one = work(str(number), str(number))
        made.arrived(one, float(number))
        made.started(one, 1, float(number))
        made.ended(one, float(number))
    assert len(made._tenants) < 300
    assert "debtor" in made._tenants
    assert made._floors["floor"] is made._tenants["floor"], "prefixes are kept for it"
    assert "a" not in made._tenants
    assert made.limited
    assert not made._works


@pytest.mark.parametrize("held", [0, 7])
def test_to_be_told_twice_is_to_be_told_once(held: int) -> None:
    made = quotas(a={"floor": 0.5})
    one = work("1")
    for _ in range(2):
        made.arrived(one, 0.0)
        made.started(one, 10, 0.0, held=held)
    assert (made.used("a"), made.running("a"), made._pending) == (10, 1, 10 - held)
    for _ in range(2):
        made.stopped(one, 0.0)
    assert (made.used("a"), made.running("a"), made._pending) == (0, 0, 0)
    made.holds(one, 5)
    assert made.used("a") == 0, "what does not run has nothing"
