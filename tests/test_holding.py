"""What the engine keeps is sent later, complete, and counted as if it had been sent at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.engine.holding import (
    COUNTS,
    COUNTS_S,
    HOLD,
    KEPT,
    STATS_S,
    TokenHolder,
    can_wait,
    only_gauges,
)


@dataclass
class Output:
    """As much of vLLM's `EngineCoreOutput` as is looked at."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    events: list[str] | None = None
    kv_transfer_params: dict[str, Any] | None = None


@dataclass
class Message:
    """As much of `EngineCoreOutputs`."""

    outputs: list[Output]
    timestamp: float
    scheduler_stats: Any = None
    finished_requests: set[str] | None = None
    utility_output: Any = None


def request(name: str, hold: Any = None, client: int = 0) -> Any:
    """A request of a client that asks for `hold`."""
    params = SimpleNamespace(extra_args=None if hold is None else {HOLD: hold})
    return SimpleNamespace(request_id=name, client_index=client, sampling_params=params)


def send(holder: TokenHolder, *outputs: Output, at: float, **others: Any) -> Message | None:
    """Pass one client's step; returns its message, if there is one."""
    step = {0: Message(list(outputs), at, **others)}
    holder.filter(step, lambda _stats: True)
    return step.get(0)


class Client:
    """Counts what it receives as the lane does, and as vLLM would have counted every step."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.last: dict[str, float] = {}
        self.steps: Counter[int] = Counter()
        """Tokens of each step, as the histogram of iterations has them."""
        self.latencies: Counter[float] = Counter()

    def receive(self, message: Message, holds: dict[str, int | None]) -> None:
        counted = 0
        for output in message.outputs:
            name = output.request_id
            kept, last, steps = (output.kv_transfer_params or {}).get(KEPT, (0, 0.0, ()))
            for number, (tokens, latencies) in enumerate(steps, 1):
                if number == len(steps):
                    counted += tokens
                else:
                    self.steps[tokens] += 1
                for latency, count in latencies:
                    self.latencies[latency] += count
            if name == COUNTS:
                continue
            assert holds[name] is not None or not output.kv_transfer_params
            assert kept <= len(output.new_token_ids)
            counted += len(output.new_token_ids) - kept
            self.tokens[name] += output.new_token_ids
            if name in self.last:
                self.latencies[message.timestamp - max(last, self.last[name])] += 1
            self.last[name] = message.timestamp
        self.steps[counted] += 1


@dataclass
class Expected:
    """The same steps with nothing kept."""

    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    last: dict[str, float] = field(default_factory=dict)
    steps: Counter[int] = field(default_factory=Counter)
    latencies: Counter[float] = field(default_factory=Counter)

    def step(self, outputs: list[Output], now: float) -> None:
        self.steps[sum(len(output.new_token_ids) for output in outputs)] += 1
        for output in outputs:
            name = output.request_id
            self.tokens[name] += output.new_token_ids
            if name in self.last:
                self.latencies[now - self.last[name]] += 1
            self.last[name] = now


HOLDS = st.sampled_from([None, 0, 0, 1, 2, 3, 8])
# Quarters are exact in binary, so that latencies can be compared for equality.
PAUSES = st.sampled_from([0.25, 0.25, 0.25, 0.75])


@given(data=st.data(), holds=st.lists(HOLDS, min_size=1, max_size=6))
def test_every_token_arrives_in_order_and_is_counted_once(
    data: st.DataObject, holds: list[int | None]
) -> None:
    """Steps of several clients; each request ends, and with it everything that was kept."""
    holder = TokenHolder()
    names = {f"r{index}": hold for index, hold in enumerate(holds)}
    home = {name: index % 2 for index, name in enumerate(names)}
    for name, hold in names.items():
        holder.add(request(name, hold, home[name]))
    clients, expected = [Client(), Client()], [Expected(), Expected()]
    running, now, token = list(names), 0.0, 0
    while running:
        # At least one runs: a step without outputs has no client.
        stepping = [name for name in running if data.draw(st.booleans())] or running[:1]
        now += data.draw(PAUSES)
        step: dict[int, Message] = {}
        for name in stepping:
            count = data.draw(st.integers(1, 3))
            ends = data.draw(st.integers(0, 5)) == 0
            preempted = data.draw(st.integers(0, 9)) == 0
            made = Output(
                name,
                list(range(token, token + count)),
                "length" if ends else None,
                ["preempted"] if preempted else None,
            )
            token += count
            step.setdefault(home[name], Message([], now)).outputs.append(made)
            if ends:
                running.remove(name)
        for client, message in step.items():
            expected[client].step(message.outputs, now)
        holder.filter(step, lambda _stats: True)
        for client, message in step.items():
            assert message.outputs
            clients[client].receive(message, names)
    for client, want in zip(clients, expected, strict=True):
        assert client.tokens == want.tokens
        assert client.steps == want.steps
        assert client.latencies == want.latencies
    assert len(holder) == 0


@given(
    steps=st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=2, max_size=30),
    every=st.integers(1, 6),
)
def test_an_interval_is_never_exceeded(steps: list[tuple[int, bool]], every: int) -> None:
    """The client would wait longer than it asked for; it shows what makes up an interval, as vLLM.

    A preemption has what is kept sent early, which does not begin an interval.
    """
    holder = TokenHolder()
    holder.add(request("a", every))
    now, shown, came, made = 100.0, 0, 0, 0
    for count, preempted in steps:
        now += 0.25
        made += count
        events = ["preempted"] if preempted else None
        message = send(holder, Output("a", [0] * count, None, events), at=now)
        if message is not None and message.outputs[0].request_id == "a":
            came += len(message.outputs[0].new_token_ids)
            if not shown or came - shown >= every:
                shown = came
        assert made - shown < every, "and the first token waits for nothing"


def test_what_is_kept_is_counted_every_half_second() -> None:
    """Counters would lag until the end of a long answer; its tokens nobody reads before that."""
    holder = TokenHolder()
    holder.add(request("a", 0))
    assert send(holder, Output("a", [1]), at=100.0)
    assert send(holder, Output("a", [2]), at=100.25) is None
    message = send(holder, Output("a", [3]), at=100.25 + COUNTS_S)
    assert message is not None
    (only,) = message.outputs
    assert (only.request_id, only.new_token_ids) == (COUNTS, [])
    assert only.kv_transfer_params == {KEPT: [0, 0.0, [[1, [[0.25, 1]]], [1, [[0.5, 1]]]]]}
    assert send(holder, Output("a", [4]), at=101.0) is None, "the half second begins anew"
    message = send(holder, Output("a", [5], "length"), at=101.25)
    assert message is not None
    assert message.outputs[0].new_token_ids == [2, 3, 4, 5]


def test_every_client_is_told() -> None:
    """Who comes first in a step must not be the only one."""
    holder = TokenHolder()
    names = ("a", "b")
    for name in names:
        holder.add(request(name, 0))
    for at in (100.0, 100.25, 100.25 + COUNTS_S):
        step = {number: Message([Output(name, [1])], at) for number, name in enumerate(names)}
        holder.filter(step, lambda _stats: True)
    assert [message.outputs[0].request_id for message in step.values()] == [COUNTS, COUNTS]


def test_what_goes_out_anyway_tells_it() -> None:
    """A message that only counts is for clients that hear nothing else."""
    holder = TokenHolder()
    holder.add(request("a", 0))
    holder.add(request("b", 0))
    send(holder, Output("a", [1]), at=100.0)
    for number in range(4):
        holder.add(request(f"b{number}", 0))
        message = send(holder, Output("a", [2]), Output(f"b{number}", [1]), at=100.25 + number / 4)
        assert message is not None
        assert [one.request_id for one in message.outputs] == [f"b{number}"]


def test_requests_of_others_are_left_as_they_are() -> None:
    holder = TokenHolder()
    for name, hold in {"plain": None, "text": "3", "negative": -1}.items():
        holder.add(request(name, hold))
    holder.add(SimpleNamespace(request_id="pooling", sampling_params=None))
    assert len(holder) == 0
    holder.add(request("held", 0))
    for at in (1.0, 1.1):
        outputs = [Output(name, [1]) for name in ("plain", "text", "negative", "pooling")]
        message = send(holder, *outputs, at=at)
        assert message is not None
        assert [one.kv_transfer_params for one in message.outputs] == [None] * 4


def test_an_aborted_request_leaves_nothing_behind() -> None:
    """Its tokens would be sent with the next request of that name, or stay for ever."""
    holder = TokenHolder()
    holder.add(request("a", 0))
    send(holder, Output("a", [1]), at=1.0)
    send(holder, Output("a", [2]), at=1.1)
    holder.forget(["a", "unknown"])
    assert len(holder) == 0
    holder.add(request("a", 0))
    message = send(holder, Output("a", [9], "length"), at=1.2)
    assert message is not None
    assert message.outputs[0].new_token_ids == [9]
    assert len(holder) == 0


def test_what_is_kept_of_a_request_that_the_engine_aborts_is_given_out() -> None:
    holder = TokenHolder()
    for name in ("a", "b"):
        holder.add(request(name, 0))
    send(holder, Output("a", [1]), Output("b", [2]), at=1.0)
    send(holder, Output("a", [3, 4]), at=1.25)
    ((name, (tokens, params)),) = holder.release(0, ["a", "b", "unknown"]).items()
    assert (name, tokens) == ("a", [3, 4])
    assert params[KEPT] == [2, 1.25, [[2, [[0.25, 1]]], [0, []]]]
    assert len(holder) == 0
    assert holder.release(0, ["a"]) == {}


def test_the_steps_of_requests_that_end_together_are_counted_once() -> None:
    holder = TokenHolder()
    for name in ("a", "b"):
        holder.add(request(name, 0))
    for at in (1.0, 1.25):
        send(holder, Output("a", [1]), Output("b", [2]), at=at)
    given = holder.release(0, ["a", "b"])
    steps = [params[KEPT][2] for _, params in given.values()]
    assert steps == [[[2, [[0.25, 2]]], [0, []]], []]


def test_what_is_kept_of_a_request_that_is_taken_is_counted_later() -> None:
    holder = TokenHolder()
    holder.add(request("a", 0))
    send(holder, Output("a", [1]), at=1.0)
    send(holder, Output("a", [2, 3]), at=1.25)
    assert holder.take(["a", "unknown"]) == {"a": [2, 3]}
    assert holder.take(["a"]) == {}
    message = send(holder, Output("other", [9]), at=1.5)
    assert message is not None
    other, counts = message.outputs
    assert other.kv_transfer_params is None
    assert counts == Output(
        COUNTS, [], kv_transfer_params={KEPT: [0, 0.0, [[2, [[0.25, 1]]], [0, []]]]}
    )
    message = send(holder, Output("other", [9]), at=1.75)
    assert message is not None
    assert len(message.outputs) == 1, "and once"


def test_clients_do_not_get_each_others_counts() -> None:
    holder = TokenHolder()
    for name in ("a", "b"):
        holder.add(request(name, 0))

    def step(at: float, *ends: str) -> dict[int, Message]:
        made = {
            client: Message([Output(name, [0], "length" if name in ends else None)], at)
            for client, name in enumerate(("a", "b"))
        }
        holder.filter(made, lambda _stats: True)
        return made

    step(1.0)
    assert step(1.25) == {}
    both = step(1.5, "a")
    assert list(both) == [0]
    steps = both[0].outputs[0].kv_transfer_params
    assert steps is not None
    assert steps[KEPT] == [1, 1.25, [[1, [[0.25, 1]]], [0, []]]]


# Statistics


def test_gauges_alone_are_sent_only_now_and_then() -> None:
    holder = TokenHolder()
    holder.add(request("a", 0))
    assert send(holder, Output("a", [1]), at=10.0, scheduler_stats="gauges")
    assert send(holder, Output("a", [2]), at=10.001, scheduler_stats="gauges") is None
    late = send(holder, Output("a", [3]), at=10.0 + 2 * STATS_S, scheduler_stats="gauges")
    assert late is not None
    assert (late.outputs, late.scheduler_stats) == ([], "gauges")
    assert send(holder, Output("a", [4]), at=10.001 + 2 * STATS_S, scheduler_stats="new") is None


def test_news_of_one_client_do_not_hide_the_gauges() -> None:
    """vLLM sends them to whoever comes first in a step, here always the one that waits."""
    holder = TokenHolder()
    holder.add(request("a", 0))
    sent = []
    for number in range(50):
        at = 10.0 + number * STATS_S / 5
        step = {
            0: Message([Output("a", [1])], at, scheduler_stats="gauges"),
            1: Message([Output("streamed", [1])], at),
        }
        holder.filter(step, lambda _stats: True)
        sent.append(0 in step)
    assert 8 <= sum(sent) <= 12


@pytest.mark.parametrize(
    "others",
    [
        {"scheduler_stats": "counters"},
        {"finished_requests": {"b"}},
        {"utility_output": "answer"},
    ],
)
def test_messages_with_other_news_are_always_sent(others: dict[str, Any]) -> None:
    """Counters would be lost; a utility call would never return."""
    holder = TokenHolder()
    holder.add(request("a", 0))
    send(holder, Output("a", [1]), at=10.0)
    step = {0: Message([Output("a", [2])], 10.001, **others)}
    holder.filter(step, lambda stats: stats != "counters")
    assert step[0].outputs == []


@pytest.mark.vllm
def test_statistics_with_counters_are_told_from_gauges() -> None:
    """Each counter of vLLM's `SchedulerStats` by itself; a new one must be looked at."""
    pytest.importorskip("vllm")
    from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats

    assert only_gauges(SchedulerStats(num_running_reqs=3, num_waiting_reqs=1, kv_cache_usage=0.5))
    for prefix in ({"requests": 1}, {"queries": 1}, {"reset": True}):
        assert not only_gauges(SchedulerStats(prefix_cache_stats=PrefixCacheStats(**prefix)))
    counters = (
        "connector_prefix_cache_stats",
        "kv_cache_eviction_events",
        "spec_decoding_stats",
        "kv_connector_stats",
        "ec_connector_stats",
        "cudagraph_stats",
        "perf_stats",
        "iteration_details",
    )
    for name in counters:
        if hasattr(SchedulerStats(), name):
            stats = SchedulerStats()
            setattr(stats, name, [object()])
            assert not only_gauges(stats), name


@pytest.mark.vllm
def test_the_last_gauges_before_the_engine_sleeps_are_always_sent() -> None:
    """Otherwise an aborted request counts as running until there is another."""
    pytest.importorskip("vllm")
    from vllm.v1.metrics.stats import SchedulerStats

    holder = TokenHolder()
    holder.add(request("a", 0))
    for at, running in ((10.0, 1), (10.01, 1), (10.02, 0)):
        outputs = [Output("a", [1])] if running else []
        if not running:
            holder.forget(["a"])
        step = {0: Message(outputs, at, scheduler_stats=SchedulerStats(num_running_reqs=running))}
        holder.filter(step, can_wait)
    assert step[0].scheduler_stats.num_running_reqs == 0
    assert can_wait(SchedulerStats(num_waiting_reqs=1))


def test_what_aborted_requests_had_is_counted_when_nothing_else_comes() -> None:
    """A client whose last request is aborted may not hear of this engine again for hours."""

    def message(request_id: str, carried: dict[str, Any]) -> Message:
        return Message([Output(request_id, [], kv_transfer_params=carried)], 0.0)

    holder = TokenHolder(message)
    holder.add(request("gone", 0, client=1))
    holder.add(request("stays", 0, client=0))
    for now in (1.0, 1.125, 1.25):
        step = {
            index: Message([Output(name, [7])], now) for index, name in enumerate(("stays", "gone"))
        }
        holder.filter(step, can_wait)
        assert bool(step) == (now == 1.0), "the first output is shown at once"
    holder.forget(["gone"])
    step = {0: Message([Output("stays", [7])], 1.375)}
    holder.filter(step, can_wait)
    (counts,) = step.pop(1).outputs
    assert not step, "the other client's wait, as before"
    assert (counts.request_id, counts.kv_transfer_params) == (
        COUNTS,
        {KEPT: [0, 0.0, [[1, [[0.125, 1]]], [1, [[0.125, 1]]]]]},
    )
    holder.forget(["gone"])
    holder.filter(step, can_wait)
    assert not step, "once"
