"""Limits of tenants: what is counted, who is let in, and that floors can be had at every moment."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm_plugins.scheduling.policy import Work
from scalellm_plugins.scheduling.quotas import Quotas
from scalellm_plugins.scheduling.tenant_limits import (
    CEILING,
    FLOOR,
    MAX_RUNNING,
    NONE,
    RATE,
    TenantLimits,
)

BLOCKS, BLOCK = 100, 10
TENANTS = "abcd"


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
    extra = {MAX_RUNNING: 3, FLOOR: 0.25, CEILING: 0.5, RATE: 600, "other": 1}
    assert TenantLimits.of(extra) == TenantLimits(
        max_running=3, floor=0.25, ceiling=0.5, tokens_per_minute=600
    )
    assert TenantLimits.of(None) is TenantLimits.of({"other": 1}) is NONE
    for value in (True, "3", None, -1, math.nan, math.inf):
        extra = dict.fromkeys((MAX_RUNNING, FLOOR, CEILING, RATE), value)
        assert TenantLimits.of(extra) == NONE, value
    assert TenantLimits.of({FLOOR: 0.5, CEILING: 0.2}).floor == 0.2


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
    assert refused.retry_s is None
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
    assert (refused.status, refused.retry_s) == (429, 5.0)
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
    assert refused.retry_s == 441, "the debt, and one"
    refused = made.refusal(work("2", prompt=500), 0.0)
    assert refused is not None
    assert refused.retry_s == 500


def test_another_rate_keeps_what_was_taken() -> None:
    made = quotas(a={"tokens_per_minute": 600})
    made.arrived(work("1", prompt=500), 0.0)
    made.note("a", TenantLimits(tokens_per_minute=1200), 0.0)
    assert made.tokens("a", 0.0) == 700


def test_tenants_that_left_are_forgotten() -> None:
    """Names may be the clients' own: there is no end of them."""
    made = quotas(a={"max_running": 3}, debtor={"tokens_per_minute": 1})
    made.arrived(work("long", "debtor", prompt=10**6), 0.0)
    made.started(work("long", "debtor"), 1, 0.0)
    for number in range(2000):
        one = work(str(number), str(number))
        made.arrived(one, float(number))
        made.started(one, 1, float(number))
        made.ended(one, float(number))
    assert len(made._tenants) < 300
    assert "debtor" in made._tenants
    assert "a" not in made._tenants
    assert made.limited
    assert len(made._works) == 1


# At every moment

LIMITS = st.builds(
    TenantLimits,
    max_running=st.one_of(st.none(), st.integers(1, 4)),
    floor=st.sampled_from([0.0, 0.0, 0.2, 0.5, 0.9]),
    ceiling=st.sampled_from([None, None, 0.9]),
    tokens_per_minute=st.one_of(st.none(), st.integers(1, 500)),
)
OPS = st.lists(
    st.one_of(
        st.tuples(st.just("note"), st.sampled_from(TENANTS), LIMITS),
        st.tuples(st.just("arrive"), st.sampled_from(TENANTS), st.integers(1, 1200)),
        st.tuples(st.just("arrive"), st.sampled_from(TENANTS), st.integers(1, 100)),
        st.tuples(st.just("admit"), st.integers(0, 99), st.integers(0, 5)),
        st.tuples(st.just("grow"), st.integers(0, 99), st.integers(1, 8)),
        st.tuples(st.just("preempt"), st.integers(0, 99), st.none()),
        st.tuples(st.just("end"), st.integers(0, 99), st.booleans()),
        st.tuples(st.just("wait"), st.integers(0, 70), st.none()),
    ),
    max_size=60,
)


class Pool:
    """A host that does as it is told. Prefixes are shared: a table may have others' blocks."""

    def __init__(self) -> None:
        self.quotas = Quotas(BLOCKS, BLOCK)
        self.now = 0.0
        self.waiting: list[Work] = []
        self.tables: dict[Work, int] = {}
        self.shared: dict[Work, int] = {}
        self.let_in: dict[str, int] = dict.fromkeys(TENANTS, 0)
        self.number = 0

    @property
    def free(self) -> int:
        return BLOCKS - sum(self.tables.values()) + sum(self.shared.values())

    def need(self, one: Work) -> int:
        return -(-(one.prompt + one.made + 1) // BLOCK)

    def do(self, what: str, who: Any, how: Any) -> None:
        if what == "note":
            self.quotas.note(who, how, self.now)
        elif what == "wait":
            self.now += who
        elif what == "arrive":
            self.number += 1
            one = work(str(self.number), who, prompt=min(how, BLOCKS * BLOCK - 100))
            if self.quotas.refusal(one, self.now) is None:
                self.quotas.arrived(one, self.now)
                self.waiting.append(one)
        elif what == "admit" and self.waiting:
            self.admit(self.waiting[who % len(self.waiting)], how)
        elif self.tables:
            self.change(what, list(self.tables)[who % len(self.tables)], how)

    def admit(self, one: Work, shared: int) -> None:
        need = self.need(one)
        if not self.quotas.allows(one, need, self.free, self.now):
            return
        while (name := self.quotas.gives_way(one, need, self.free, self.now)) is not None:
            self.preempt([other for other in self.tables if other.tenant == name][-1])
        if self.free < need:
            assert not self.quotas.guaranteed(one, need, self.now), "a floor can always be had"
            return
        self.waiting.remove(one)
        self.tables[one] = need
        self.shared[one] = min(shared, need) if len(self.tables) > 1 else 0
        one.computed = one.prompt
        self.quotas.started(one, need, self.now)

    def change(self, what: str, one: Work, how: Any) -> None:
        if what == "grow":
            self.tables[one] += min(how, self.free)
            one.made += 1
            self.quotas.holds(one, self.tables[one])
            self.quotas.made(one.tenant, 1, self.now)
            while (name := self.quotas.over_ceiling()) is not None:
                self.preempt([other for other in self.tables if other.tenant == name][-1])
        elif what == "preempt":
            self.preempt(one)
        elif what == "end":
            del self.tables[one], self.shared[one]
            self.quotas.ended(one, self.now)

    def preempt(self, one: Work) -> None:
        del self.tables[one], self.shared[one]
        one.preemptions += 1
        self.quotas.stopped(one, self.now)
        self.waiting.append(one)

    def check(self) -> None:
        made = self.quotas
        for tenant in TENANTS:
            own = [one for one in self.tables if one.tenant == tenant]
            assert made.used(tenant) == sum(self.tables[one] for one in own)
            assert made.running(tenant) == len(own)
            known = made._tenants.get(tenant)
            if known is not None:
                assert known.works == len(own) + sum(w.tenant == tenant for w in self.waiting)
            limit = known.limits.tokens_per_minute if known else None
            assert made.tokens(tenant, self.now) <= (limit or math.inf)
        assert made._pending == 0
        assert made._running == len(self.tables)
        assert sum(made.floor_blocks().values()) <= BLOCKS
        if not self.tables and self.waiting:
            one = self.waiting[0]
            assert made.allows(one, self.need(one), self.free, self.now), "somebody is let in"


@settings(max_examples=300)
@given(OPS)
def test_sums_are_right_and_floors_can_be_had_at_every_moment(ops: list[tuple[Any, ...]]) -> None:
    pool = Pool()
    for op in ops:
        pool.do(*op)
        pool.check()
    while pool.tables:
        pool.do("end", 0, True)
    for one in pool.waiting:
        pool.quotas.ended(one, pool.now)
    assert not pool.quotas._works
    assert all(not one.used and not one.works for one in pool.quotas._tenants.values())


@settings(max_examples=200)
@given(
    st.integers(1, 500),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 300), st.integers(0, 40)), max_size=60),
)
def test_no_window_lets_in_more_than_a_bucket_and_its_rate(
    rate: int, asks: list[tuple[float, int, int]]
) -> None:
    """Between any two moments: what the bucket holds, what ran into it, and one that overdraws."""
    made = quotas(a={"tokens_per_minute": rate})
    now, let_in = 0.0, [(0.0, 0)]
    for number, (pause, prompt, output) in enumerate(asks):
        now += pause
        one = work(str(number), prompt=prompt)
        if made.refusal(one, now) is None:
            made.arrived(one, now)
            let_in.append((now, prompt))
            made.made("a", output, now)
    for start in range(len(let_in)):
        total = 0
        for end in range(start, len(let_in)):
            total += let_in[end][1]
            span = let_in[end][0] - let_in[start][0]
            overdraft = max(0, let_in[end][1] - rate)
            assert total <= rate + span * rate / 60 + overdraft + 1e-3 * (1 + end)


@given(st.integers(1, 1000), st.integers(1, 2000), st.integers(0, 3000))
def test_who_comes_when_he_was_told_to_is_let_in(rate: int, prompt: int, used: int) -> None:
    made = quotas(a={"tokens_per_minute": rate})
    made.made("a", used, 0.0)
    refused = made.refusal(work("1", prompt=prompt), 0.0)
    if refused is not None:
        assert refused.retry_s is not None
        if refused.retry_s > 0.1:
            assert made.refusal(work("1", prompt=prompt), refused.retry_s * 0.9) is not None
        assert made.refusal(work("1", prompt=prompt), refused.retry_s) is None


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
