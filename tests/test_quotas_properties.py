"""Limits of tenants in any order of events: sums, floors that can be had, windows of tokens."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm_plugins.scheduling.policy import Work
from scalellm_plugins.scheduling.quotas import Quotas
from scalellm_plugins.scheduling.tenant_limits import TenantLimits

BLOCKS, BLOCK = 100, 10
TENANTS = "abcd"


def work(name: str, tenant: str = "a", prompt: int = 10) -> Work:
    made = Work(name, prompt=prompt, most=10)
    made.tenant = tenant
    return made


def with_rate(rate: int) -> Quotas:
    made = Quotas(BLOCKS, BLOCK)
    made.note("a", TenantLimits(tokens_per_minute=rate), 0.0)
    return made


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
    made = with_rate(rate)
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
    made = with_rate(rate)
    made.made("a", used, 0.0)
    refused = made.refusal(work("1", prompt=prompt), 0.0)
    if refused is not None:
        seconds = refused.retry_after_s
        assert seconds is not None
        if seconds > 1:  # it is told in whole seconds
            assert made.refusal(work("1", prompt=prompt), (seconds - 1) * 0.9) is not None
        assert made.refusal(work("1", prompt=prompt), seconds) is None
