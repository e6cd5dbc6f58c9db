"""Virtual token counters: whoever waits gets its share, whatever the others send."""

from __future__ import annotations

import random
from collections import deque
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm_plugins.config import SchedulerConfig
from scalellm_plugins.scheduling import fair
from scalellm_plugins.scheduling.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT, Fair, VirtualTokens
from scalellm_plugins.scheduling.policy import Policy, Stack, Work
from scalellm_plugins.testing.conformance import check_policy
from scalellm_plugins.testing.virtual_host import VirtualHost, engine

SEATS, LONGEST_PROMPT, LONGEST_OUTPUT = 4, 64, 32
BOUND = 2 * max(
    PROMPT_WEIGHT * LONGEST_PROMPT + OUTPUT_WEIGHT * LONGEST_OUTPUT,
    OUTPUT_WEIGHT * SEATS * LONGEST_OUTPUT,
)
"""Of the difference in service per weight while two tenants both wait."""

ONE = st.tuples(st.integers(1, LONGEST_PROMPT), st.integers(1, LONGEST_OUTPUT))


class Engine:
    """Serves one token per running request and step, and admits as the policy says."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.policy = VirtualTokens()
        for tenant, weight in weights.items():
            self.policy.weigh(tenant, weight)
        self.waiting: dict[str, deque[tuple[int, int]]] = {}
        self.running: list[list[object]] = []
        self.tokens = dict.fromkeys(weights, 0.0)
        """Weighted service by tenant, counted here."""

    def send(self, tenant: str, request: tuple[int, int]) -> None:
        self.policy.arrive(tenant, self.waiting)
        self.waiting.setdefault(tenant, deque()).append(request)

    def step(self) -> None:
        while self.waiting and len(self.running) < SEATS:
            tenant = self.policy.first(self.waiting)
            prompt, output = self.waiting[tenant].popleft()
            if not self.waiting[tenant]:
                del self.waiting[tenant]
                self.policy.empty(tenant)
            self.policy.serve(tenant, prompt=prompt)
            self.tokens[tenant] += PROMPT_WEIGHT * prompt
            self.running.append([tenant, output])
        for one in self.running:
            tenant = str(one[0])
            self.policy.serve(tenant, output=1)
            self.tokens[tenant] += OUTPUT_WEIGHT
            one[1] -= 1  # type: ignore[operator]
        self.running = [one for one in self.running if one[1]]


@settings(max_examples=60)
@given(
    st.lists(ONE, min_size=1, max_size=8),
    st.lists(ONE, min_size=1, max_size=8),
    st.sampled_from([1.0, 1.0, 2.0, 5.0]),
    st.integers(2, 20),
)
def test_two_that_wait_get_the_same_at_every_moment(
    mine: list[tuple[int, int]], theirs: list[tuple[int, int]], weight: float, flood: int
) -> None:
    """One always has some waiting, the other floods."""
    engine = Engine({"a": weight, "b": 1.0})
    sizes = {"a": mine, "b": theirs}
    numbers = {"a": count(), "b": count()}
    for _ in range(400):
        for tenant, depth in (("a", SEATS + 1), ("b", SEATS * flood)):
            while len(engine.waiting.get(tenant, ())) < depth:
                chosen = sizes[tenant]
                engine.send(tenant, chosen[next(numbers[tenant]) % len(chosen)])
        engine.step()
        difference = engine.tokens["a"] / weight - engine.tokens["b"]
        assert abs(difference) <= BOUND, "equal service per weight"


def test_ten_that_wait_get_the_same() -> None:
    engine = Engine({str(number): 1.0 for number in range(10)})
    for _ in range(3000):
        for number in range(10):
            while len(engine.waiting.get(str(number), ())) < SEATS + 1 + 3 * number:
                engine.send(str(number), (1 + 6 * number, 1 + 3 * number))
        engine.step()
        assert max(engine.tokens.values()) - min(engine.tokens.values()) <= 2 * BOUND


def test_nobody_saves_service_up() -> None:
    """Who was away for an hour does not shut the others out for one."""
    policy = VirtualTokens()
    policy.arrive("busy", [])
    policy.serve("busy", prompt=1000, output=1_000_000)
    policy.arrive("back", ["busy"])
    assert policy.served("back") == policy.served("busy")


def test_after_a_pause_of_all_nobody_is_ahead() -> None:
    policy = VirtualTokens()
    policy.arrive("a", [])
    policy.serve("a", output=500)
    policy.empty("a")
    policy.arrive("b", [])
    assert policy.served("b") == policy.served("a")


def test_tenants_that_left_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names may be the clients' own: there is no end of them."""
    monkeypatch.setattr(fair, "MOST", 100)
    policy = VirtualTokens()
    policy.weigh("0", 3.0)
    for number in range(1000):
        policy.arrive(str(number), ["waits"] if number else [])
        policy.serve(str(number), output=number)
        policy.arrive("waits", [])
    assert len(policy._served) <= 102
    assert "waits" in policy._served
    assert not policy._weights


# The policy, in virtual time

WORST = PROMPT_WEIGHT * LONGEST_PROMPT + OUTPUT_WEIGHT * SEATS * LONGEST_OUTPUT
"""What whoever is served last can be ahead: its prompt, and all that then runs for it. At most
max(wp × Linput, wq × M) of the paper, where the M tokens of running work hold prompts, too."""


def fair_policy(**options: Any) -> Fair:
    return Fair(engine(seats=SEATS, step_tokens=256), SchedulerConfig(**options))


class Backlog:
    """Tenants that always have some waiting. Their service is counted here."""

    def __init__(self, policy: Policy, weights: dict[str, float], seed: int = 0) -> None:
        self.host = VirtualHost(policy)
        self.weights = weights
        self.chance = random.Random(seed)
        self.works: dict[str, list[Work]] = {tenant: [] for tenant in weights}
        self.locality = policy.options.locality_tokens

    def send(self, tenant: str, prompt: int, most: int, cached: int = 0) -> Work:
        work = Work(f"{tenant}{len(self.works[tenant])}", prompt=prompt, most=most)
        work.tenant, work.weight, work.cached = tenant, self.weights[tenant], cached
        self.works[tenant].append(work)
        self.host.arrive(work)
        return work

    def fill(self, hostile: str) -> None:
        """Keep everybody's queue full; one sends more, and the longest."""
        waiting = dict.fromkeys(self.weights, 0)
        for queue in self.host.waiting.values():
            waiting[queue[0][2].tenant] += len(queue)
        for tenant in self.weights:
            often = 4 if tenant == hostile else 1
            while waiting[tenant] <= often * SEATS:
                waiting[tenant] += 1
                prompt, most = LONGEST_PROMPT, LONGEST_OUTPUT
                if tenant != hostile:
                    prompt, most = self.chance.randint(1, prompt), self.chance.randint(1, most)
                cached = self.chance.choice([0, self.chance.randint(0, prompt)])
                self.send(tenant, prompt, most, cached if self.locality else 0)

    def served(self, tenant: str) -> float:
        """Weighted tokens per weight."""
        tokens = 0.0
        ran = {name for what, name in self.host.log if what == "admitted"}
        for work in self.works[tenant]:
            if work.id in ran:
                tokens += PROMPT_WEIGHT * (work.prompt - work.cached) + OUTPUT_WEIGHT * work.made
        return tokens / self.weights[tenant]


@settings(max_examples=40)
@given(
    st.sampled_from([2, 10]),
    st.sampled_from([(1.0, 1.0), (1.0, 3.0), (0.5, 2.0)]),
    st.sampled_from([0, 100]),
    st.sampled_from([1000, 12]),
    st.integers(0, 10**6),
)
def test_backlogged_tenants_are_within_the_bound_at_every_moment(
    tenants: int, weights: tuple[float, float], locality: int, blocks: int, seed: int
) -> None:
    """Equal or weighted, one of them hostile, with locality or without, also when KV is short."""
    policy = Fair(
        engine(seats=SEATS, step_tokens=256, blocks=blocks),
        SchedulerConfig(locality_tokens=locality),
    )
    names = {f"t{number}": weights[number % 2] for number in range(tenants)}
    backlog = Backlog(policy, names, seed)
    for _ in range(250):
        backlog.fill(hostile="t1")
        backlog.host.step()
        served = [backlog.served(tenant) for tenant in names]
        assert max(served) - min(served) <= WORST / min(names.values()) + locality


def test_first_come_first_served_would_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is one that a flood breaks where nobody sees to it."""
    backlog = Backlog(Policy(engine(seats=SEATS), SchedulerConfig()), {"t0": 1.0, "t1": 1.0})
    gaps = []
    for _ in range(600):
        backlog.fill(hostile="t1")
        backlog.host.step()
        gaps.append(abs(backlog.served("t0") - backlog.served("t1")))
    assert max(gaps) > 4 * WORST


def test_it_is_a_policy() -> None:
    check_policy(Fair)
    check_policy(Fair, SchedulerConfig(locality_tokens=100))
    check_policy(
        lambda made, options: Stack([Policy(made, options), Fair(made, options)]), seeds=range(4)
    )


def test_options_are_what_tokens_cost() -> None:
    policy = fair_policy(prompt_weight=3.0, output_weight=5.0)
    host = VirtualHost(policy)
    work = Work("1", prompt=10, most=4)
    host.arrive(work)
    while host.works():
        host.step()
    assert policy.counters.served("default") == 3 * 10 + 5 * 4


def test_a_prompt_is_charged_once_and_not_where_it_did_not_run() -> None:
    policy = fair_policy()
    work = Work("1", prompt=10, most=4)
    policy.arrived(work, (), 0.0)
    for _ in range(2):
        policy.admitted(work, 0.0)
        policy.withdrawn(work, 0.0)
    assert policy.counters.served("default") == 0
    policy.admitted(work, 0.0)
    work.preemptions = 1
    policy.preempted(work, 0.0)
    policy.admitted(work, 0.0)
    policy.withdrawn(work, 0.0)
    assert policy.counters.served("default") == 10


def test_tokens_are_charged_once_however_often_they_are_looked_at() -> None:
    policy = fair_policy()
    work = Work("1")
    for made in (0, 3, 3, 7):
        work.made = made
        policy.account([work, work], 0.0)
    assert policy.counters.served("default") == 7 * OUTPUT_WEIGHT


def arrive(policy: Fair, name: str, tenant: str, waiting: set[str], **fields: Any) -> Work:
    work = Work(name, prompt=fields.pop("prompt", 10))
    work.tenant = tenant
    for field, value in fields.items():
        setattr(work, field, value)
    policy.arrived(work, waiting, 0.0)
    return work


@pytest.mark.parametrize("told", [True, False])
def test_a_pause_of_all_saves_nothing_up_within_other_policies_either(told: bool) -> None:
    """In a stack nobody says when a tenant's last has gone."""
    policy = fair_policy()
    busy = arrive(policy, "1", "busy", set())
    policy.admitted(busy, 0.0)
    if told:
        policy.emptied("busy")
    arrive(policy, "2", "back", set())
    assert policy.counters.served("back") == policy.counters.served("busy") == 10


def test_who_is_preempted_saved_nothing_up() -> None:
    """One long answer, and nothing waiting: then it waits again, far behind, and floods."""
    policy = fair_policy()
    slow = arrive(policy, "slow", "slow", set())
    policy.admitted(slow, 0.0)
    for number in range(100):
        busy = arrive(policy, str(number), "busy", {"busy"})
        policy.admitted(busy, 0.0)
    slow.preemptions = 1
    policy.preempted(slow, 0.0)
    assert policy.counters.served("slow") >= policy.counters.served("busy") - 10


# Locality


def test_prefixes_in_the_cache_go_first_within_the_deficit() -> None:
    policy = fair_policy(locality_tokens=100)
    cold = arrive(policy, "cold", "a", set())
    warm = arrive(policy, "warm", "b", {"a"}, cached=8)
    warmer = arrive(policy, "warmer", "c", {"a", "b"}, cached=9)
    heads = {"a": cold, "b": warm, "c": warmer}
    assert policy.first(heads, 0.0) == "c"
    policy.counters.serve("c", prompt=100)
    assert policy.first(heads, 0.0) == "c", "within"
    policy.counters.serve("c", prompt=1)
    assert policy.first(heads, 0.0) == "b", "beyond"
    policy.counters.serve("b", prompt=101)
    assert policy.first(heads, 0.0) == "a"
    assert fair_policy().first(heads, 0.0) == "a", "without the option, turns alone count"


def test_what_is_in_the_cache_is_not_charged() -> None:
    policy = fair_policy(locality_tokens=100)
    work = arrive(policy, "1", "a", set(), prompt=50, cached=32)
    policy.admitted(work, 0.0)
    assert policy.counters.served("a") == 18
    work.cached = 0  # evicted meanwhile
    policy.withdrawn(work, 0.0)
    assert policy.counters.served("a") == 0, "what was charged is given back"


def test_with_room_for_one_prefix_locality_uses_it_and_stays_fair() -> None:
    """Two tenants, a prefix each, a cache that holds the last one: turns would miss every time."""
    hits = {}
    for locality in (0, 2000):
        policy = fair_policy(locality_tokens=locality)
        heads, cache, hits[locality], served = {}, "", 0, dict.fromkeys("ab", 0.0)
        for number in range(400):
            for tenant in "ab":
                if tenant not in heads:
                    others = set(heads)
                    heads[tenant] = arrive(policy, f"{tenant}{number}", tenant, others, prompt=100)
            for tenant, work in heads.items():
                work.cached = 90 if tenant == cache else 0
            cache = str(policy.first(heads, 0.0))
            work = heads.pop(cache)
            hits[locality] += work.cached > 0
            policy.admitted(work, 0.0)
            work.made = 10
            policy.account([work], 0.0)
            served[cache] += 100 - (work.cached if locality else 0) + OUTPUT_WEIGHT * work.made
            assert abs(served["a"] - served["b"]) <= 120 + locality
    assert hits[0] == 0
    assert hits[2000] > 380


@given(
    st.integers(1, 200),
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=2, max_size=30),
)
def test_a_request_overtakes_so_many_tokens_and_no_more(
    locality: int, sizes: list[tuple[int, int]]
) -> None:
    policy = fair_policy(locality_tokens=locality)
    works = [
        arrive(policy, str(number), "a", {"a"}, prompt=prompt, cached=min(cached, prompt))
        for number, (prompt, cached) in enumerate(sizes)
    ]
    before = [policy.order(work) for work in works]
    for work in works:
        work.cached = 0  # looked up again
    assert [policy.order(work) for work in works] == before
    order = sorted(works, key=policy.order)
    for place, work in enumerate(order):
        for other in order[place + 1 :]:
            if works.index(other) < works.index(work):
                between = works[works.index(other) : works.index(work)]
                assert sum(one.prompt for one in between) < locality


def test_tenants_that_left_are_forgotten_with_their_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fair, "MOST", 100)
    policy = fair_policy(locality_tokens=10)
    for number in range(1000):
        arrive(policy, str(number), str(number), {"waits"})
    assert len(policy._lines) <= 102
