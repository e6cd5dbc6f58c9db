"""Virtual token counters: whoever waits gets its share, whatever the others send."""

from __future__ import annotations

from collections import deque
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm_plugins.scheduling import fair
from scalellm_plugins.scheduling.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT, VirtualTokens

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
