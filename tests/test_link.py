"""The lane's own way of reading the engine's messages, over vLLM's sockets and codec."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

pytest.importorskip("vllm")
pytest.importorskip("zmq")

import zmq
import zmq.asyncio
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    UtilityOutput,
)
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from scalellm_plugins.frontends.link import Link

pytestmark = pytest.mark.vllm
LIMIT_S = 30.0


class Processor:
    """Stands for the output processor: notes what it is given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.errors: list[Exception] = []
        self.aborts: list[str] = []
        self.fails = False
        self.news = asyncio.Event()

    def process_outputs(self, outputs: Any, timestamp: Any, stats: Any, **others: Any) -> Any:
        self.news.set()
        if self.fails:
            raise RuntimeError("made to fail")
        self.seen += [(one.request_id, timestamp, stats is not None) for one in outputs]
        return SimpleNamespace(reqs_to_abort=self.aborts)

    def update_scheduler_stats(self, stats: Any) -> None:
        self.news.set()

    def propagate_error(self, error: Exception) -> None:
        self.news.set()
        self.errors.append(error)


class Engine:
    """vLLM's client without an engine, and the sockets of the engine that is not there."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        wrapped = zmq.asyncio.Context(self.context)
        outputs, inputs = wrapped.socket(zmq.PULL), wrapped.socket(zmq.ROUTER)
        outputs.bind("inproc://outputs")
        inputs.bind("inproc://inputs")
        self.push = self.context.socket(zmq.PUSH)
        self.push.connect("inproc://outputs")
        self.dealer = self.context.socket(zmq.DEALER)
        self.dealer.setsockopt(zmq.IDENTITY, b"\0\0")
        self.dealer.connect("inproc://inputs")
        self.records: list[Any] = []
        core = object.__new__(AsyncMPClient)
        core.resources = BackgroundResources(
            ctx=self.context, output_socket=outputs, input_socket=inputs
        )
        core.input_socket = inputs
        core.encoder, core.decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
        core.outputs_queue, core.utility_results = asyncio.Queue(), {}
        core.core_engine, core.client_index = b"\0\0", 3
        core.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(enable_fault_tolerance=False)
        )
        core._ensure_output_queue_task()
        self.core, self.processor = core, Processor()
        self.client = SimpleNamespace(
            engine_core=core,
            output_processor=self.processor,
            renderer=SimpleNamespace(mm_processor_cache=None),
            log_stats=True,
            output_handler=asyncio.create_task(self._handler()),
            _logger_ref=[SimpleNamespace(record=lambda **what: self.records.append(what))],
        )

    async def _handler(self) -> None:
        """vLLM's: passes on what its other task has decoded."""
        while True:
            outputs = await self.core.get_output_async()
            self.processor.process_outputs(outputs.outputs, outputs.timestamp, object())

    def send(self, name: str, **others: Any) -> None:
        """Send a message with one output, as the engine does."""
        outputs = [EngineCoreOutput(name, [1])] if name else []
        message = EngineCoreOutputs(outputs=outputs, timestamp=5.0, **others)
        self.push.send_multipart(MsgpackEncoder().encode(message))

    async def until(self, condition: Any) -> None:
        """Wait for something that the link does when a message comes."""
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                self.processor.news.clear()
                await self.processor.news.wait()

    def received(self) -> list[bytes]:
        """Return what the engine was sent, after its identity."""
        assert self.dealer.poll(int(LIMIT_S * 1000))
        frames: list[bytes] = self.dealer.recv_multipart()
        return frames

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.processor.seen]

    async def close(self) -> None:
        tasks = [self.core.resources.output_queue_task, self.client.output_handler]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sock in (self.push, self.dealer, self.core.input_socket):
            sock.close(linger=0)
        self.core.resources.output_socket.close(linger=0)
        self.context.term()


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[Engine]:
    made = Engine()
    yield made
    await made.close()


def opened(engine: Engine) -> Link:
    link = Link.open(engine.client)
    assert link is not None
    return link


async def test_messages_arrive_in_order_and_are_counted(engine: Engine) -> None:
    opened(engine)
    stats = SchedulerStats(num_running_reqs=2)
    engine.send("a", scheduler_stats=stats, engine_index=0)
    engine.send("b")
    engine.send("", scheduler_stats=stats)
    await engine.until(lambda: len(engine.records) == 3)
    assert engine.processor.seen == [("a", 5.0, True), ("b", 5.0, True)]
    counted = [
        (one["iteration_stats"] is not None, one["scheduler_stats"] == stats)
        for one in engine.records
    ]
    assert counted == [(True, True), (True, False), (False, True)]


async def test_nothing_is_lost_when_the_link_takes_over(engine: Engine) -> None:
    """Messages before (vLLM's tasks), at that moment, and after it."""
    engine.send("before")
    await engine.until(lambda: engine.names == ["before"])
    engine.send("at once")
    opened(engine)
    engine.send("directly after")
    await engine.until(lambda: len(engine.names) == 3)
    engine.send("later")
    await engine.until(lambda: len(engine.names) == 4)
    assert engine.names == ["before", "at once", "directly after", "later"]


async def test_a_message_of_which_the_descriptor_says_nothing_is_read(engine: Engine) -> None:
    """It tells of a change only, and asking for events (as vLLM's socket does) takes that away."""
    plain = zmq.Socket.shadow(engine.core.resources.output_socket)
    engine.send("a")
    assert plain.poll(LIMIT_S * 1000)
    assert plain.getsockopt(zmq.EVENTS) & zmq.POLLIN
    opened(engine)
    await engine.until(lambda: engine.names == ["a"])


async def test_many_messages_at_once_leave_connections_their_turn(engine: Engine) -> None:
    opened(engine)
    turns: list[int] = []

    def turn() -> None:
        turns.append(len(engine.names))
        if len(engine.names) < 1000:
            asyncio.get_running_loop().call_soon(turn)

    for number in range(1000):
        engine.send(str(number))
    turn()
    await engine.until(lambda: len(engine.names) == 1000)
    assert engine.names == [str(number) for number in range(1000)]
    steps = [after - before for before, after in pairwise(turns)]
    # In one turn of the event loop: the descriptor's callback, and one that goes on reading.
    assert max(steps) <= 128


async def test_utility_calls_are_answered(engine: Engine) -> None:
    opened(engine)
    futures = {number: asyncio.get_running_loop().create_future() for number in (7, 8)}
    engine.core.utility_results.update(futures)
    engine.send("", utility_output=UtilityOutput(8, failure_message="no"))
    engine.send("", utility_output=UtilityOutput(7, result=UtilityResult("yes")))
    async with asyncio.timeout(LIMIT_S):
        assert await futures[7] == "yes"
        with pytest.raises(Exception, match="no"):
            await futures[8]
    assert engine.records == []


async def test_a_dead_engine_is_told_and_nothing_is_sent_any_more(engine: Engine) -> None:
    link = opened(engine)
    engine.send("a")
    engine.push.send(EngineCoreProc.ENGINE_CORE_DEAD)
    await engine.until(lambda: bool(engine.processor.errors))
    (error,) = engine.processor.errors
    assert isinstance(error, EngineDeadError)
    assert engine.names == ["a"]
    async with asyncio.timeout(LIMIT_S):
        await engine.client.output_handler
    assert engine.client.output_handler.done(), "vLLM asks this to tell whether it is alive"
    with pytest.raises(EngineDeadError):
        link.add(request(), None)
    link.abort(["a"])
    assert not engine.dealer.poll(0)


@pytest.mark.parametrize("kind", ["garbage", "failure"])
async def test_a_failure_is_told_to_all_once(engine: Engine, kind: str) -> None:
    opened(engine)
    if kind == "garbage":
        engine.push.send(b"\xc1")
    else:
        engine.processor.fails = True
        engine.send("a")
    engine.send("b")
    await engine.until(lambda: bool(engine.processor.errors))
    async with asyncio.timeout(LIMIT_S):
        await engine.client.output_handler
    assert len(engine.processor.errors) == 1


def request() -> EngineCoreRequest:
    return EngineCoreRequest("name", [1, 2], None, None, None, 0.0, None, None, None)


async def test_requests_and_aborts_leave_at_once(engine: Engine) -> None:
    link = opened(engine)
    link.add(request(), None)
    link.abort(["x", "y"])
    kind, *frames = engine.received()
    assert kind == EngineCoreRequestType.ADD.value
    sent = MsgpackDecoder(EngineCoreRequest).decode(frames)
    assert (sent.request_id, sent.client_index) == ("name", 3)
    kind, *frames = engine.received()
    assert kind == EngineCoreRequestType.ABORT.value
    assert MsgpackDecoder().decode(frames) == ["x", "y"]


async def test_requests_that_ended_at_a_stop_string_are_aborted(engine: Engine) -> None:
    opened(engine)
    engine.processor.aborts = ["a"]
    engine.send("a")
    await engine.until(lambda: engine.names == ["a"])
    kind, *frames = engine.received()
    assert (kind, MsgpackDecoder().decode(frames)) == (EngineCoreRequestType.ABORT.value, ["a"])


async def test_vllm_ends_the_link_as_its_own_task(engine: Engine) -> None:
    """Its clean-up cancels the task; a reader that stayed would spin on a closed socket."""
    opened(engine)
    task = engine.core.resources.output_queue_task
    assert task is engine.client.output_handler
    assert not task.done()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    descriptor = engine.core.resources.output_socket.getsockopt(zmq.FD)
    assert not asyncio.get_running_loop().remove_reader(descriptor)
    # Whose answers the engine did not finish must hear of it: the server waits for them to end.
    assert [type(error) for error in engine.processor.errors] == [EngineDeadError]


class OtherClient(AsyncMPClient):
    """Several engines, or something that does not exist yet."""


async def test_anything_unusual_keeps_vllms_tasks(engine: Engine) -> None:
    tasks = (engine.core.resources.output_queue_task, engine.client.output_handler)

    def declined() -> bool:
        return Link.open(engine.client) is None

    engine.client.renderer.mm_processor_cache = object()
    assert declined()
    engine.client.renderer.mm_processor_cache = None
    engine.core.vllm_config.parallel_config.enable_fault_tolerance = True
    assert declined()
    engine.core.vllm_config.parallel_config.enable_fault_tolerance = False
    engine.core.outputs_queue.put_nowait(EngineCoreOutputs())
    assert declined(), "a message that was read already would be overtaken"
    engine.core.outputs_queue.get_nowait()
    engine.client.output_handler = None
    assert declined()
    engine.client.output_handler = tasks[1]
    engine.core.__class__ = OtherClient
    assert declined()
    engine.core.__class__ = AsyncMPClient
    assert not any(task.cancelled() or task.cancelling() for task in tasks)
    engine.send("still")
    await engine.until(lambda: engine.names == ["still"])
    assert Link.open(engine.client) is not None
