"""Counters of what is in flight: sums over worker slots, tickets, and a lock that can die."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scalellm_plugins.errors import ConfigError
from scalellm_plugins.frontends import admission as admission_module
from scalellm_plugins.frontends.admission import SERVER, Admission, Prompt, Ticket
from scalellm_plugins.frontends.limits import (
    PROMPT_TOKENS,
    QUEUED_PROMPT_TOKENS,
    QUEUED_REQUESTS,
    REQUESTS,
    Limits,
    Refusal,
)

NOTHING = [0, 0, 0, 0]


def bounds(**limits: int) -> Any:
    return Limits(**limits).by_gauge()


def admitted(counters: Admission, name: str = "a", **limits: int) -> Ticket:
    entry = counters.index(name)
    assert counters.enter(name, entry, bounds(**limits)) is None
    return Ticket(counters, name, entry)


def test_a_request_is_counted_from_its_headers_to_its_end() -> None:
    counters = Admission.private()
    ticket = admitted(counters)
    entry = counters.index("a")
    assert counters.used(entry) == counters.used(SERVER) == [1, 1, 0, 0]
    prompt = ticket.prompt(70)
    assert isinstance(prompt, Prompt)
    assert counters.used(entry) == [1, 1, 70, 70]
    prompt.first()
    assert counters.used(entry) == counters.used(SERVER) == [1, 0, 70, 0]
    ticket.leave()
    assert counters.used(entry) == counters.used(SERVER) == NOTHING
    assert counters.left(entry) == counters.left(SERVER) == [1, 1, 70, 70]


def test_everything_may_happen_too_often() -> None:
    counters = Admission.private()
    ticket = admitted(counters)
    prompt = ticket.prompt(5)
    assert isinstance(prompt, Prompt)
    for _ in range(2):
        prompt.first()
        ticket.first()
        prompt.done()
        ticket.leave()
    late = ticket.prompt(9)
    assert isinstance(late, Prompt), "a client that went away meanwhile is no refusal"
    late.first()
    late.grow(3)
    late.done()
    assert counters.used(SERVER) == NOTHING
    assert counters.left(SERVER) == [1, 1, 5, 5]


def test_a_response_in_the_background_stays_counted_until_the_engine_has_done() -> None:
    counters = Admission.private()
    ticket = admitted(counters)
    prompt = ticket.prompt(5, running=True)
    assert isinstance(prompt, Prompt)
    ticket.leave()
    assert counters.used(SERVER) == [1, 1, 5, 5]
    prompt.done()
    assert counters.used(SERVER) == NOTHING
    # It may also begin after the exchange has ended, and may then be refused.
    again = ticket.prompt(6, running=True)
    assert isinstance(again, Prompt)
    assert counters.used(SERVER) == [1, 1, 6, 6]
    late = admitted(counters, "b")
    late.leave()
    refused = late.prompt(7, server_bounds=bounds(max_prompt_tokens=10), running=True)
    assert isinstance(refused, Refusal)
    assert counters.used(SERVER) == [1, 1, 6, 6]
    again.first()
    assert counters.used(SERVER) == [1, 0, 6, 0]
    again.done()
    assert counters.used(SERVER) == NOTHING


def test_the_first_token_of_a_request_is_that_of_its_only_prompt() -> None:
    counters = Admission.private()
    ticket = admitted(counters)
    ticket.prompt(5)
    ticket.first()
    assert counters.used(SERVER) == [1, 0, 5, 0]


def test_only_the_first_prompt_of_a_request_can_be_refused() -> None:
    """Else the second turn of a conversation with tools would fail in the middle of it."""
    counters = Admission.private()
    other = admitted(counters, "b")
    other.prompt(10)
    ticket = admitted(counters)
    first = ticket.prompt(10)
    assert isinstance(first, Prompt)
    first.done()
    again = ticket.prompt(90, server_bounds=bounds(max_prompt_tokens=20))
    assert isinstance(again, Prompt)
    assert counters.used(SERVER)[PROMPT_TOKENS] == 100


def test_a_prompt_whose_length_turns_out_later() -> None:
    counters = Admission.private()
    ticket = admitted(counters)
    prompt = ticket.prompt(0)
    assert isinstance(prompt, Prompt)
    prompt.grow(12)
    assert counters.used(SERVER) == [1, 1, 12, 12]
    prompt.done()
    ticket.leave()
    assert counters.used(SERVER) == NOTHING


@pytest.mark.parametrize(
    ("limits", "tokens", "gauge"),
    [
        ({"max_requests": 2}, 0, REQUESTS),
        ({"max_queued_requests": 2}, 0, QUEUED_REQUESTS),
        ({"max_prompt_tokens": 100}, 50, PROMPT_TOKENS),
        ({"max_queued_prompt_tokens": 100}, 50, QUEUED_PROMPT_TOKENS),
    ],
)
def test_each_limit_refuses_what_comes_after_it(
    limits: dict[str, int], tokens: int, gauge: int
) -> None:
    counters = Admission.private()
    entry = counters.index("a")
    tickets = [admitted(counters, **limits) for _ in range(2)]
    for ticket in tickets:
        assert isinstance(ticket.prompt(tokens, bounds(**limits)), Prompt)
    limit = next(iter(limits.values()))
    mine = counters.enter("a", entry, bounds(**limits))
    assert mine == Refusal("a", gauge, limit, limit, 1)
    servers = counters.enter("b", counters.index("b"), server_bounds=bounds(**limits))
    assert servers == Refusal(None, gauge, limit, limit, 1)
    assert counters.used(counters.index("b")) == NOTHING, "a refused request leaves no trace"
    tickets[0].leave()
    assert counters.enter("a", entry, bounds(**limits)) is None


def test_queued_limits_have_room_again_with_the_first_token() -> None:
    counters = Admission.private()
    limits = bounds(max_queued_requests=1, max_queued_prompt_tokens=10)
    ticket = admitted(counters)
    prompt = ticket.prompt(10, limits)
    assert isinstance(prompt, Prompt)
    assert counters.enter("a", counters.index("a"), limits) is not None
    prompt.first()
    assert counters.enter("a", counters.index("a"), limits) is None


def test_a_prompt_beyond_what_is_left_waits_and_one_beyond_the_limit_gets_in_alone() -> None:
    counters = Admission.private()
    limits = bounds(max_prompt_tokens=100)
    small, large = admitted(counters), admitted(counters)
    assert isinstance(small.prompt(10, limits), Prompt)
    assert large.prompt(300, limits) == Refusal("a", PROMPT_TOKENS, 100, 10, 300)
    small.leave()
    assert isinstance(large.prompt(300, limits), Prompt)


def test_slots_share_the_sums_and_not_the_words() -> None:
    whole = Admission.create(3)
    first, second = whole.for_slot(0), whole.for_slot(2)
    limits = bounds(max_requests=2)
    entry = first.index("a")
    assert second.index("a") == entry
    assert second.index("b") != entry
    assert first.enter("a", entry, limits) is None
    assert second.enter("a", entry, limits) is None
    refused = first.enter("a", entry, limits)
    assert refused is not None
    assert refused.used == 2
    whole.forget(2)
    assert first.used(entry) == first.used(SERVER) == [1, 1, 0, 0]


def test_too_many_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "MOST_TENANTS", 2)
    counters = Admission.private()
    assert [counters.index(name) for name in "aba"] == [1, 2, 1]
    with pytest.raises(ConfigError, match=r"'c'.*2 tenants.*Restart"):
        counters.index("c")


# Any sequence of events over several workers, tenants and deaths

SLOTS = 3
TENANTS = {
    "a": bounds(max_requests=3, max_prompt_tokens=40),
    "b": bounds(max_queued_requests=2, max_queued_prompt_tokens=25),
    "c": bounds(),
}
SERVERS = bounds(max_requests=6, max_queued_requests=4, max_prompt_tokens=70)


class Workers(RuleBasedStateMachine):
    """Admitted requests by slot, against what the shared words say."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = Admission.create(SLOTS)
        self.slots = [self.whole.for_slot(slot) for slot in range(SLOTS)]
        self.live: list[tuple[int, Ticket, list[Prompt]]] = []
        self.left = NOTHING

    @rule(slot=st.integers(0, SLOTS - 1), name=st.sampled_from(sorted(TENANTS)))
    def enter(self, slot: int, name: str) -> None:
        counters = self.slots[slot]
        entry = counters.index(name)
        before = counters.used(entry), counters.used(SERVER)
        refusal = counters.enter(name, entry, TENANTS[name], SERVERS)
        full = [
            limit is not None and used >= limit
            for used, limit in zip(
                [*before[0], *before[1]], [*TENANTS[name], *SERVERS], strict=True
            )
        ]
        assert (refusal is not None) == any(full)
        if refusal is None:
            self.live.append((slot, Ticket(counters, name, entry), []))
        else:
            assert (counters.used(entry), counters.used(SERVER)) == before

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=st.integers(0, 60))
    def prompt(self, data: st.DataObject, tokens: int) -> None:
        _, ticket, prompts = data.draw(st.sampled_from(self.live))
        running = data.draw(st.booleans())
        made = ticket.prompt(tokens, TENANTS[ticket.tenant], SERVERS, running=running)
        if isinstance(made, Prompt):
            prompts.append(made)
        else:
            assert not prompts
            assert made.used
            assert made.used + tokens > made.limit

    @precondition(lambda self: self.live)
    @rule(data=st.data(), what=st.sampled_from(["first", "done"]))
    def advance(self, data: st.DataObject, what: str) -> None:
        _, _, prompts = data.draw(st.sampled_from(self.live))
        for prompt in prompts[:1]:
            getattr(prompt, what)()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.live))
        self.live.remove(chosen)
        _, ticket, prompts = chosen
        ticket.leave()
        for prompt in prompts:
            prompt.done()

    @rule(slot=st.integers(0, SLOTS - 1))
    def kill(self, slot: int) -> None:
        """A worker dies with what it has; its requests never leave."""
        self.whole.forget(slot)
        self.live = [entry for entry in self.live if entry[0] != slot]

    @invariant()
    def sums_are_right(self) -> None:
        counters = self.slots[0]
        per_tenant = [counters.used(counters.index(name)) for name in TENANTS]
        server = counters.used(SERVER)
        assert [sum(column) for column in zip(*per_tenant, strict=True)] == server
        assert all(value >= 0 for used in per_tenant for value in used)
        assert server[REQUESTS] == len(self.live)
        assert server[QUEUED_REQUESTS] <= server[REQUESTS]
        assert server[QUEUED_PROMPT_TOKENS] <= server[PROMPT_TOKENS]
        for name, used in zip(TENANTS, per_tenant, strict=True):
            limit = TENANTS[name][REQUESTS]
            assert limit is None or used[REQUESTS] <= limit
        assert server[REQUESTS] <= 6
        assert server[QUEUED_REQUESTS] <= 4

    @invariant()
    def what_left_only_grows(self) -> None:
        left = self.slots[0].left(SERVER)
        assert all(now >= before for now, before in zip(left, self.left, strict=True))
        self.left = left

    def teardown(self) -> None:
        for _, ticket, prompts in self.live:
            ticket.leave()
            for prompt in prompts:
                prompt.done()
        assert self.slots[0].used(SERVER) == NOTHING


TestWorkers = Workers.TestCase
TestWorkers.settings = settings(max_examples=60, stateful_step_count=40)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_token_sums_stay_within_the_limit_unless_one_request_is_alone(sizes: list[int]) -> None:
    counters = Admission.private()
    limits = bounds(max_queued_prompt_tokens=50)
    inside = []
    for size in sizes:
        if counters.enter("a", counters.index("a"), limits) is not None:
            assert counters.used(SERVER)[QUEUED_PROMPT_TOKENS] >= 50
            continue
        ticket = Ticket(counters, "a", counters.index("a"))
        if isinstance(ticket.prompt(size, limits), Prompt):
            inside.append(ticket)
        else:
            ticket.leave()
    assert counters.used(SERVER)[QUEUED_PROMPT_TOKENS] <= 50 or len(inside) == 1


# Several processes

LIMIT = 5


def _hammer(counters: Admission, slot: int, rounds: int, report: Connection) -> None:
    """Enter and leave; tell the largest sum that was ever seen."""
    mine = counters.for_slot(slot)
    entry = mine.index("a")
    limits = bounds(max_requests=LIMIT)
    most = 0
    for _ in range(rounds):
        tickets = []
        for _ in range(3):
            if mine.enter("a", entry, limits) is None:
                tickets.append(Ticket(mine, "a", entry))
            with mine._lock:  # else the slots' words are of different moments
                most = max(most, mine.used(entry)[REQUESTS])
        for ticket in tickets:
            ticket.prompt(7)
            ticket.leave()
    report.send(most)


def _die_with_the_lock(counters: Admission, slot: int) -> None:
    mine = counters.for_slot(slot)
    while mine.enter("a", mine.index("a"), bounds(max_requests=LIMIT)) is not None:
        pass  # its limit is that of the others
    mine._lock.__enter__()
    os.kill(os.getpid(), signal.SIGKILL)


def test_four_processes_never_pass_a_limit_and_one_may_die_with_the_lock() -> None:
    context = multiprocessing.get_context("fork")
    counters = Admission.create(4)
    dying = context.Process(target=_die_with_the_lock, args=(counters, 3))
    pairs = [context.Pipe(duplex=False) for _ in range(3)]
    workers = [
        context.Process(target=_hammer, args=(counters, slot, 400, send))
        for slot, (_, send) in enumerate(pairs)
    ]
    for process in [*workers, dying]:
        process.start()
    seen = []
    for receive, _ in pairs:
        assert receive.poll(120), "a worker waits for a lock that nobody holds"
        seen.append(receive.recv())
    for process in [*workers, dying]:
        process.join()
    assert dying.exitcode == -signal.SIGKILL
    assert max(seen) <= LIMIT
    assert counters.used(SERVER) == [1, 1, 0, 0], "what the dead one held"
    counters.forget(3)
    assert counters.used(SERVER) == counters.used(counters.index("a")) == NOTHING
    assert counters.left(SERVER)[PROMPT_TOKENS] == 7 * counters.left(SERVER)[REQUESTS]


def test_entering_waits_for_the_lock_of_another_process() -> None:
    """Without it the test above would pass on one core almost always."""
    context = multiprocessing.get_context("fork")
    counters = Admission.create(2)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_hammer, args=(counters, 1, 1, send))
    with counters._lock:
        process.start()
        assert not receive.poll(0.3), "it entered while another process held the lock"
    assert receive.poll(60)
    process.join()
