"""The fair queue: prompts are charged once, and not at all where nothing ran."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.request import RequestStatus  # noqa: E402

from scalellm_plugins.scheduling.fair import TENANT, WEIGHT, VirtualTokens  # noqa: E402
from scalellm_plugins.scheduling.waiting import FairQueue, weight_of  # noqa: E402


class Request:
    """As much of vLLM's as is looked at."""

    def __init__(self, name: str, tenant: str, prompt: int = 10, **extra: Any) -> None:
        self.request_id = name
        self.num_prompt_tokens = prompt
        self.status = RequestStatus.WAITING
        self.sampling_params = SimpleNamespace(extra_args={TENANT: tenant, **extra})


@pytest.fixture
def policy() -> VirtualTokens:
    return VirtualTokens()


@pytest.fixture
def queue(policy: VirtualTokens) -> FairQueue:
    made = FairQueue(policy)
    for name, tenant in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        made.add_request(Request(name, tenant))
    return made


def names(queue: FairQueue) -> list[str]:
    taken = []
    while queue:
        peeked = queue.peek_request()
        assert queue.pop_request() is peeked
        taken.append(peeked.request_id)
    return taken


def test_tenants_take_turns(queue: FairQueue) -> None:
    assert len(queue) == 3
    assert names(queue) == ["a1", "b1", "a2"]
    with pytest.raises(IndexError):
        queue.pop_request()
    with pytest.raises(IndexError):
        queue.peek_request()


def test_what_could_not_be_scheduled_costs_nothing(queue: FairQueue, policy: VirtualTokens) -> None:
    """vLLM takes requests out to see whether they fit, and puts them back."""
    taken = queue.pop_request()
    assert policy.served("a") == 10
    queue.prepend_requests([taken])
    assert policy.served("a") == 0
    assert names(queue) == ["a1", "b1", "a2"]


def test_a_preempted_request_is_not_charged_twice(queue: FairQueue, policy: VirtualTokens) -> None:
    taken = queue.pop_request()
    taken.status = RequestStatus.PREEMPTED
    queue.prepend_request(taken)
    names(queue)
    assert policy.served("a") == 20, "two prompts"
    queue.prepend_requests([taken])
    assert policy.served("a") == 20, "what has run is not given back"
    queue.forget(["a1", "a2", "b1"])
    assert not queue._charged


def test_aborted_requests_leave(queue: FairQueue) -> None:
    inside = {one.request_id: one for one in queue}
    queue.remove_requests([inside["a1"], inside["b1"], Request("other", "c")])
    assert names(queue) == ["a2"]
    with pytest.raises(ValueError, match="not in deque"):
        queue.remove_request(inside["a1"])


def test_weights_that_make_no_sense_are_none() -> None:
    for weight in (0, -1, float("inf"), float("nan"), True, "2", None):
        assert weight_of(Request("x", "a", **{WEIGHT: weight})) is None
    assert weight_of(Request("x", "a", **{WEIGHT: 2})) == 2.0
