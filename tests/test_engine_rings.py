"""Engine and API server by shared memory: what goes in on one side comes out on the other."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats
from vllm.v1.outputs import LogprobsLists
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from scalellm_plugins.engine.plain import PlainOutputs
from scalellm_plugins.frontends.engine_rings import FROM_ENGINE, Columns, EngineRings
from scalellm_plugins.frontends.merged_socket import MergedSocket

from . import ring_parts as parts

pytestmark = pytest.mark.vllm

ADD, ABORT = EngineCoreRequestType.ADD, EngineCoreRequestType.ABORT
LIMIT_S = 20.0


class Pair:
    """An engine and one connected API server."""

    def __init__(self, engine: parts.Engine, client: Any, address: str) -> None:
        self.engine = engine
        self.client = client
        self.address = address
        self.rings: EngineRings = parts.connected(client)
        self.seen = parts.Seen()

    def start(self) -> None:
        self.rings.start(self.seen)

    def admit(self, *names: str, **others: Any) -> None:
        """Send requests and have the engine take them."""
        for name in names:
            self.rings.add(b"\0\0", parts.request(name, **others))
        assert len(self.engine.take()) == len(names)

    def close(self) -> None:
        self.rings.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    (address,) = parts.addresses()
    with parts.client_at(address) as client:
        made = Pair(parts.Engine([address]), client, address)
        yield made
        made.close()
        made.engine.close()


async def until(true: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    async with asyncio.timeout(limit_s):
        while not true():
            await asyncio.sleep(0.001)


def outputs(*content: EngineCoreOutput, **others: Any) -> EngineCoreOutputs:
    return EngineCoreOutputs(outputs=list(content), timestamp=7.25, **others)


def token(name: str, *ids: int, **others: Any) -> EngineCoreOutput:
    return EngineCoreOutput(name, list(ids), **others)


# To the engine


@pytest.mark.parametrize("length", [1, 3, 4_000, 200_000])
async def test_a_request_arrives_as_it_would_by_vllms_sockets(pair: Pair, length: int) -> None:
    """Short: in the main loop; long: in the thread; longer than the ring: in a segment."""
    sent = parts.request(
        prompt=list(range(length)),
        sampling_params=SamplingParams(stop=["x"], extra_args={"tenant": "t"}, seed=3),
        cache_salt="salt",
        priority=2,
        trace_headers={"a": "b"},
        external_req_id="outer",
    )
    encoded = MsgpackEncoder().encode(sent)
    expected, _ = pair.engine.preprocess_add_request(
        MsgpackDecoder(EngineCoreRequest).decode(encoded)
    )
    pair.rings.add(b"\0\0", sent)
    assert sent.prompt_token_ids == list(range(length)), "vLLM goes on using it"
    kind, (got, wave) = await asyncio.to_thread(pair.engine.input_queue.get)
    assert (kind, wave) == (ADD, 0)
    assert got.prompt_token_ids == expected.prompt_token_ids
    assert got.sampling_params == expected.sampling_params
    for field in ("request_id", "cache_salt", "priority", "trace_headers", "arrival_time"):
        assert getattr(got, field) == getattr(expected, field), field


def test_a_request_like_one_before_is_made_from_that(pair: Pair) -> None:
    params = SamplingParams(stop=["x"], extra_args={"tenant": "t"}, seed=3, max_tokens=7)
    made = []
    for number in range(3):
        sent = parts.request(
            f"r{number}",
            [number, 5],
            sampling_params=params,
            cache_salt=None if number else "salt",
            priority=number,
            arrival_time=float(number),
            external_req_id=f"outer{number}",
        )
        pair.rings.add(b"\0\0", sent, receiver=sent)
        ((_, (got, _)),) = pair.engine.take()
        assert (got.request_id, got.prompt_token_ids) == (f"r{number}", [number, 5])
        assert (got.cache_salt, got.priority) == (sent.cache_salt, number)
        assert (got.arrival_time, got.sampling_params) == (number, params)
        made.append(got)
    assert made[1].sampling_params is not made[2].sampling_params, "whoever changes one changes all"
    (engine,) = pair.rings._engines.values()
    assert list(engine.likes._known) == [id(params)]


def test_a_request_that_was_not_sent_is_nobodys_like(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine,) = pair.rings._engines.values()
    params = SamplingParams(max_tokens=7)
    first, second = (parts.request(name, sampling_params=params) for name in ("a", "b"))
    with monkeypatch.context() as patch:
        patch.setattr(engine.channel, "put", lambda *_: exec("raise OSError('no memory')"))
        with pytest.raises(OSError, match="no memory"):
            pair.rings.add(b"\0\0", first, receiver=first)
    assert not pair.rings.requests
    pair.rings.add(b"\0\0", second, receiver=second)
    ((_, (got, _)),) = pair.engine.take()
    assert got.request_id == "b"


async def test_messages_keep_their_order_behind_a_long_one(pair: Pair) -> None:
    """An abort that overtakes its request would be forgotten, and the request run for nobody."""
    pair.rings.add(b"\0\0", parts.request("long", list(range(50_000))))
    pair.rings.add(b"\0\0", parts.request("short"))
    pair.rings.send(b"\0\0", 2, MsgpackEncoder().encode(["long"]))
    got = [await asyncio.to_thread(pair.engine.input_queue.get) for _ in range(3)]
    assert [kind for kind, _ in got] == [ADD, ADD, ABORT]
    assert [got[0][1][0].request_id, got[1][1][0].request_id] == ["long", "short"]
    assert pair.engine.aborts_queue.get_nowait() == ["long"] == got[2][1]


async def test_tensors_arrive_whole(pair: Pair) -> None:
    torch = pytest.importorskip("torch")
    embeds = torch.randn(700, 64)
    sent = parts.request(prompt=[], prompt_token_ids=None, prompt_embeds=embeds)
    pair.rings.add(b"\0\0", sent)
    _, (got, _) = await asyncio.to_thread(pair.engine.input_queue.get)
    assert got.prompt_token_ids is None or len(got.prompt_token_ids) == 700
    assert torch.equal(got.prompt_embeds, embeds)


def test_a_refused_request_does_not_stop_the_main_loop(pair: Pair) -> None:
    """`empty()` must not promise an item that the refusal takes away: vLLM does not catch that."""
    pair.engine.refuses = ValueError("no")
    pair.rings.add(b"\0\0", parts.request("bad"))
    assert pair.engine.take() == []
    assert pair.engine.refused == ["bad"]


def test_a_frontend_that_connects_while_the_engine_sleeps_is_heard() -> None:
    first, second = parts.addresses(2)
    engine = parts.Engine([first, second])
    got: list[Any] = []
    loop = threading.Thread(target=lambda: got.append(engine.input_queue.get()), daemon=True)
    loop.start()
    time.sleep(0.1)  # asleep
    with parts.client_at(second, 1) as client:
        rings = parts.connected(client)
        rings.add(b"\0\0", parts.request("late", client_index=1))
        loop.join(LIMIT_S)
        assert got
        assert got[0][1][0].request_id == "late"
        rings.close()
    engine.close()


def test_others_wake_a_sleeping_engine(pair: Pair) -> None:
    """Signal handlers and vLLM's own input thread put items, too."""
    got: list[Any] = []
    loop = threading.Thread(target=lambda: got.append(pair.engine.input_queue.get()), daemon=True)
    loop.start()
    time.sleep(0.05)
    pair.engine.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
    loop.join(LIMIT_S)
    assert got == [(EngineCoreRequestType.WAKEUP, None)]


# From the engine

# As the scheduler makes them: some fields only come with the end, some with every token.
one_output = st.fixed_dictionaries(
    {"ids": st.lists(st.integers(0, 2**31 - 1), max_size=3)},
    optional={
        "end": st.fixed_dictionaries(
            {"finish_reason": st.sampled_from(list(FinishReason))},
            optional={
                "stop_reason": st.integers(0, 9) | st.text(max_size=3),
                "kv_transfer_params": st.just({"x": [1]}),
            },
        ),
        "events": st.just([EngineCoreEvent(EngineCoreEventType.PREEMPTED, timestamp=1.0)]),
        "prefill_stats": st.just(PrefillStats(num_cached_tokens=3)),
    },
)


def made(name: str, drawn: dict[str, Any], first: bool) -> EngineCoreOutput:
    values = dict(drawn)
    ids = values.pop("ids")
    if not first:
        values.pop("prefill_stats", None)
    values |= values.pop("end", {})
    if name in "ab":
        values["new_logprobs"] = LogprobsLists(
            np.array([[1, 2]]), np.array([[-0.5, -1.5]]), np.array([1])
        )
    elif name == "c":
        values["trace_headers"] = {"x": "y"}
    return EngineCoreOutput(name, ids, **values)


def plainly(output: EngineCoreOutput) -> Any:
    """An output in a form that compares, arrays included."""
    return MsgpackDecoder().decode(MsgpackEncoder().encode(output))


def leanly(step: dict[str, EngineCoreOutput], begun: set[str]) -> PlainOutputs | None:
    """A step's outputs as the lean step hands them over; None if none of them is plain."""
    plain = {
        name: output
        for name, output in step.items()
        if name in begun
        and len(output.new_token_ids) == 1
        and output == EngineCoreOutput(name, output.new_token_ids)
    }
    if not plain:
        return None
    tokens = [output.new_token_ids[0] for output in plain.values()]
    others = [output for name, output in step.items() if name not in plain]
    return PlainOutputs(list(plain), tokens, others, EngineCoreOutput)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from("abcdefgh"), one_output, max_size=8),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([set(), {0, 1, 2, 3, 4, 5, 6, 7}, {1, 2, 5}]),
)
def test_every_output_arrives_once_and_as_it_was(
    steps: list[dict[str, dict[str, Any]]], lean: set[int]
) -> None:
    """Differential: by columns, general records and vLLM's task, against what was handed over.

    `lean`: numbers of steps that come from the lean step.
    """

    async def run() -> None:
        (address,) = parts.addresses()
        with parts.client_at(address) as client:
            pair = Pair(parts.Engine([address]), client, address)
            merged = MergedSocket(client.resources.output_socket, pair.rings)
            reader = asyncio.get_running_loop().create_future()
            merged.start(reader)  # type: ignore[arg-type]
            alive = set("abcdefgh")
            begun: set[str] = set()
            pair.admit(*sorted(alive))
            for number, drawn in enumerate(steps):
                step = {
                    name: made(name, one, name not in begun)
                    for name, one in drawn.items()
                    if name in alive
                }
                given_out = outputs(*step.values(), scheduler_stats=SchedulerStats())
                expected = {name: plainly(output) for name, output in step.items()}
                if number in lean and (by_column := leanly(step, begun)) is not None:
                    given_out.outputs = by_column  # type: ignore[assignment]
                begun |= {name for name, one in drawn.items() if one["ids"]}
                given_out.timestamp = float(number + 1)
                pair.engine.give(given_out)
                alive -= {name for name, one in drawn.items() if "end" in one}
                async with asyncio.timeout(LIMIT_S):
                    (got,) = ((await merged.recv_multipart()).outputs,)
                assert got.timestamp == number + 1
                assert {one.request_id: plainly(one) for one in got.outputs} == expected
                assert got.scheduler_stats is not None
            assert merged._queue.empty()
            reader.set_result(None)
            pair.close()
            pair.engine.close()

    asyncio.run(run())


async def test_steady_steps_are_columns_and_nothing_else(pair: Pair) -> None:
    pair.start()
    pair.admit("a", "b")
    for number in range(5):
        pair.engine.give(outputs(token("a", number), token("b", number + 10)))
    await until(lambda: len(pair.seen.steps) == 5)
    step, general = pair.seen.steps[-1]
    assert (step.receivers, step.tokens, general) == (["a", "b"], [4, 14], None)
    assert not pair.seen.outputs


async def test_the_lean_steps_columns_go_as_they_are(pair: Pair) -> None:
    """No object is made of them; what columns cannot say yet goes with them."""

    def make(*_: Any) -> Any:
        raise AssertionError("an object for a token")

    pair.start()
    pair.admit("a", "b")
    pair.engine.give(outputs(token("a", 1), token("b", 2)))
    for number in range(3):
        step = outputs()
        step.outputs = PlainOutputs(["a", "b"], [number, number + 10], [], make)  # type: ignore[assignment]
        pair.engine.give(step)
    await until(lambda: len(pair.seen.steps) == 4)
    pair.admit("c")
    step = outputs()
    first = token("c", 5, prefill_stats=PrefillStats())
    step.outputs = PlainOutputs(["a", "b"], [3, 13], [first], make)  # type: ignore[assignment]
    pair.engine.give(step)
    await until(lambda: len(pair.seen.steps) == 5)
    assert [step.tokens for step, _ in pair.seen.steps[1:]] == [[0, 10], [1, 11], [2, 12], [3, 13]]
    assert {tuple(step.receivers) for step, _ in pair.seen.steps} == {("a", "b")}
    assert pair.seen.steps[-1][1].outputs[0].request_id == "c"


def test_without_a_ring_the_lean_steps_columns_are_vllms_outputs(pair: Pair) -> None:
    step = outputs()
    step.outputs = PlainOutputs(["a"], [3], [token("b", 1, 2)], EngineCoreOutput)  # type: ignore[assignment]
    pair.engine.give(step, client=1)
    ((client, sent),) = [pair.engine.upstream.get_nowait()]
    assert client == 1
    assert sent.outputs == [token("a", 3), token("b", 1, 2)]


async def test_columns_say_whose_step_they_are(pair: Pair) -> None:
    """Else all engines' tokens would be counted as the first one's."""
    merged = MergedSocket(pair.client.resources.output_socket, pair.rings)
    merged.on_step(Columns(1.0, ["a"], [7], [], engine=3), None, pair.rings)
    (made,) = ((await merged.recv_multipart()).outputs,)
    assert (made.engine_index, made.outputs) == (3, [token("a", 7)])


async def test_a_request_that_ended_gets_no_more_tokens(pair: Pair) -> None:
    """Its slot is in the columns until the engine has heard of the abort."""
    pair.start()
    pair.admit("a", "b")
    pair.engine.give(outputs(token("a", 1), token("b", 2)))
    await until(lambda: len(pair.seen.steps) == 1)
    pair.rings.forget("a")
    pair.engine.give(outputs(token("a", 3), token("b", 4)))
    await until(lambda: len(pair.seen.steps) == 2)
    step, _ = pair.seen.steps[-1]
    assert (step.receivers, step.tokens) == ([None, "b"], [3, 4])


async def test_gauges_alone_come_rarely_but_the_last_word_always(pair: Pair) -> None:
    pair.start()
    pair.admit("a")
    for number in range(10):
        step = outputs(token("a", number), scheduler_stats=SchedulerStats(num_running_reqs=1))
        step.timestamp = 1.0 + number / 1000
        pair.engine.give(step)
    pair.engine.give(EngineCoreOutputs(scheduler_stats=SchedulerStats(), timestamp=1.011))
    await until(lambda: pair.seen.outputs)
    assert sum(general is not None for _, general in pair.seen.steps) <= 2
    assert pair.seen.outputs[-1].scheduler_stats.num_running_reqs == 0


async def test_a_frontend_that_does_not_read_blocks_nobody_and_loses_nothing(pair: Pair) -> None:
    pair.admit("a", "b")
    steps = FROM_ENGINE // 30
    begun = time.monotonic()
    for number in range(steps):
        if number % 1000 == 0:
            pair.engine.give(outputs(token("a", number), token("b", 1, 2)))
        else:
            pair.engine.give(outputs(token("a", number)))
    assert time.monotonic() - begun < LIMIT_S
    pair.start()
    while len(pair.seen.steps) < steps:
        await asyncio.sleep(0.001)
        pair.engine.take()  # a main loop that has nothing to do looks here, and sends what waits
        assert time.monotonic() - begun < 2 * LIMIT_S
    assert [step.tokens[0] for step, _ in pair.seen.steps] == list(range(steps))
    assert sum(general is not None for _, general in pair.seen.steps) == steps // 1000 + 1


async def test_answers_to_calls_go_back_the_way_they_came(pair: Pair) -> None:
    """A call by the socket (a replaced worker's first one) is answered by the socket."""
    pair.start()
    pair.rings.send(b"\0\0", 3, MsgpackEncoder().encode((0, 77, "method", ())))
    ((kind, call),) = pair.engine.take()
    assert kind == EngineCoreRequestType.UTILITY
    assert list(call)[:3] == [0, 77, "method"]
    for number in (77, 78):
        answer = UtilityOutput(number, result=UtilityResult("done"))
        pair.engine.give(EngineCoreOutputs(utility_output=answer))
    await until(lambda: pair.seen.outputs)
    assert [one.utility_output.call_id for one in pair.seen.outputs] == [77]
    _, other = pair.engine.upstream.get_nowait()
    assert other.utility_output.call_id == 78


def test_what_is_not_for_a_ring_goes_to_vllms_queue(pair: Pair) -> None:
    word = b"ENGINE_CORE_DEAD"
    for item in ((-1, outputs()), (5, outputs(token("a", 1))), word):
        pair.engine.output_queue.put_nowait(item)
    assert pair.engine.upstream.qsize() == 3


# Ends


def fds() -> set[str]:
    return {
        f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}"
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }


async def test_a_frontend_that_hangs_up_has_its_requests_aborted_and_leaves_nothing(
    pair: Pair,
) -> None:
    pair.admit("x")  # what is made once
    with parts.client_at(parts.addresses()[0]):
        pass
    other = parts.addresses()[0]
    engine = parts.Engine([other])
    before = len(fds())
    with parts.client_at(other) as client:
        second = Pair(engine, client, other)
        second.start()
        second.admit("a", "b")
        second.close()
    kind, names = await asyncio.to_thread(engine.input_queue.get)
    assert kind == ABORT
    assert sorted(names) == ["a", "b"]
    engine.give(outputs(token("a", 1)))
    await until(lambda: len(fds()) <= before)
    engine.close()


async def test_a_successor_does_not_get_what_was_meant_for_the_dead() -> None:
    (address,) = parts.addresses()
    engine = parts.Engine([address])
    with parts.client_at(address) as client:
        first = Pair(engine, client, address)
        first.start()
        first.admit("old")
        second = Pair(engine, client, address)
        second.start()
        second.admit("new")
        engine.give(outputs(token("old", 1), token("new", 2)))
        engine.give(outputs(token("old", 3), token("new", 4)))
        await until(lambda: len(second.seen.steps) == 2)
        assert [step.receivers for step, _ in second.seen.steps] == [["new"], ["new"]]
        # As by the socket: vLLM drops outputs of requests that it does not know.
        assert [one.request_id for _, general in second.seen.steps for one in general.outputs] == [
            "old",
            "old",
        ]
        first.close()
        assert await asyncio.to_thread(engine.input_queue.get) == (ABORT, ["old"])
        second.close()
    engine.close()


async def test_a_dead_engine_is_told_after_its_last_outputs() -> None:
    (address,) = parts.addresses()
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        engine = parts.Engine([address])
        os.write(writer, b"x")
        engine.input_queue.get()
        engine.give(outputs(token("a", 1)))
        os.kill(os.getpid(), 9)
    os.read(reader, 1)
    with parts.client_at(address) as client:
        rings = parts.connected(client)
        seen = parts.Seen()
        rings.start(seen)
        rings.add(b"\0\0", parts.request("a"))
        await asyncio.to_thread(os.waitpid, pid, 0)
        begun = time.monotonic()
        await until(lambda: seen.errors)
        noticed = time.monotonic() - begun
        assert [type(error).__name__ for error in seen.errors] == ["EngineDeadError"]
        assert client.resources.engine_dead
        assert len(seen.steps) + len(seen.outputs) == 1
        assert noticed < 0.1
        assert not rings.reaches(b"\0\0")
        rings.close()
    for fd in (reader, writer):
        os.close(fd)


async def test_a_frontend_that_breaks_its_ring_costs_nobody_else_anything(pair: Pair) -> None:
    """What a process does to its own shared memory must not end the engine."""
    pair.start()
    pair.admit("a")
    memory = pair.rings._reading[0].channel.consumer
    memory._words[16] = 2**63  # the reader's position: ring.py
    big = "x" * 200
    for number in range(FROM_ENGINE // 100):
        pair.engine.give(outputs(token("a", number, number, stop_reason=big)))
    assert (ABORT, ["a"]) in pair.engine.take()
    pair.engine.give(outputs(token("b", 1)))
    assert pair.engine.upstream.get_nowait()[0] == 0, "by vLLM's sockets from now on"


async def test_a_message_waits_where_there_is_no_descriptor_for_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalellm_plugins.ipc import memory

    real = memory.create

    def none_left(*_: Any, **__: Any) -> int:
        raise OSError(24, "Too many open files")

    pair.start()
    pair.admit("a")
    monkeypatch.setattr(memory, "create", none_left)
    pair.engine.give(outputs(token("a", *range(300_000))))
    monkeypatch.setattr(memory, "create", real)
    pair.engine.take()
    await until(lambda: pair.seen.outputs)
    assert pair.seen.outputs[0].outputs[0].new_token_ids == list(range(300_000))
