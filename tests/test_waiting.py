"""The queue of a policy: vLLM looks at it, takes out, puts back, and nothing moves by that."""

from __future__ import annotations

from collections.abc import Hashable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from scalellm_plugins.scheduling.policy import Policy, Work  # noqa: E402
from scalellm_plugins.scheduling.waiting import PolicyQueue  # noqa: E402


class Noting(Policy):
    """Longest prompts first within a class, lowest class first; notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def group(self, work: Work) -> Hashable:
        return work.demoted, work.priority

    def order(self, work: Work) -> Any:
        return -work.prompt

    def first(self, heads: Any, now: float) -> Any:
        return min(heads)

    def arrived(self, work: Work, waiting: Any, now: float) -> None:
        self.told.append(("arrived", work.id))

    def admitted(self, work: Work, now: float) -> None:
        self.told.append(("admitted", work.id))

    def withdrawn(self, work: Work, now: float) -> None:
        self.told.append(("withdrawn", work.id))

    def preempted(self, work: Work, now: float) -> None:
        self.told.append(("preempted", work.id))

    def emptied(self, group: Hashable) -> None:
        self.told.append(("emptied", str(group)))


class Queue:
    """A queue of requests that are made by name."""

    def __init__(self) -> None:
        self.policy = Noting()
        self.works: dict[str, Work] = {}
        self.queue = PolicyQueue(
            self.policy, lambda request: self.works[request.request_id], lambda _now: None
        )

    def request(self, name: str, priority: int = 0, prompt: int = 1) -> Any:
        work = self.works[name] = Work(name, prompt=prompt)
        work.priority = priority
        return SimpleNamespace(request_id=name)

    def add(self, *args: Any) -> Any:
        made = self.request(*args)
        self.queue.add_request(made)
        return made

    def take_all(self) -> list[str]:
        taken = []
        while self.queue:
            peeked = self.queue.peek_request()
            assert self.queue.pop_request() is peeked
            taken.append(peeked.request_id)
        return taken


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), max_size=30))
def test_everything_comes_out_in_order_and_as_it_was_foretold(
    arrivals: list[tuple[int, int]],
) -> None:
    queue = Queue()
    for number, (priority, prompt) in enumerate(arrivals):
        queue.add(str(number), priority, prompt)
    assert len(queue.queue) == len(arrivals)
    assert sorted(one.request_id for one in queue.queue) == sorted(map(str, range(len(arrivals))))
    foretold = [one.request_id for one in queue.queue.ahead(100)]
    expected = sorted(range(len(arrivals)), key=lambda n: (arrivals[n][0], -arrivals[n][1], n))
    assert foretold == [str(number) for number in expected]
    assert queue.take_all() == foretold
    for empty in (queue.queue.peek_request, queue.queue.pop_request):
        with pytest.raises(IndexError, match="empty queue"):
            empty()


def test_what_is_put_back_stands_where_it_stood() -> None:
    queue = Queue()
    one, *_ = [queue.add(name) for name in ("one", "two", "three")]
    taken = queue.queue.pop_request()
    assert taken is one
    queue.add("four")
    queue.queue.prepend_requests([taken])
    assert [request.request_id for request in queue.queue.ahead(9)] == [
        "one",
        "two",
        "three",
        "four",
    ]
    assert queue.works["one"].since is None
    queue.queue.prepend_request(queue.queue.pop_request())
    assert queue.works["one"].preemptions == 1
    assert queue.take_all() == ["one", "two", "three", "four"]
    assert queue.policy.told[:9] == [
        *(("arrived", "one"), ("arrived", "two"), ("arrived", "three")),
        *(("admitted", "one"), ("arrived", "four"), ("withdrawn", "one")),
        *(("admitted", "one"), ("preempted", "one"), ("admitted", "one")),
    ]


def test_aborted_requests_leave() -> None:
    queue = Queue()
    made = {name: queue.add(name, len(name)) for name in ("a", "b", "cc")}
    queue.queue.remove_requests([made["a"], made["cc"], queue.request("elsewhere")])
    assert ("emptied", "(False, 2)") in queue.policy.told
    assert queue.take_all() == ["b"]
    with pytest.raises(ValueError, match="a does not wait"):
        queue.queue.remove_request(made["a"])


def test_hopeless_work_goes_where_the_policy_puts_it() -> None:
    queue = Queue()
    made = [queue.add(name) for name in ("one", "two")]
    queue.queue.demote(made[0])
    assert queue.take_all() == ["two", "one"]


def test_the_turn_is_asked_anew_when_something_changes() -> None:
    """vLLM peeks, then others come; a step later it peeks again."""
    queue = Queue()
    queue.add("low", 5)
    assert queue.queue.peek_request().request_id == "low"
    queue.add("high", 1)
    assert queue.queue.peek_request().request_id == "high"
