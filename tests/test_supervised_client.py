"""A worker joins engines that have been running for long, over real ZMQ sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

zmq = pytest.importorskip("zmq")
pytest.importorskip("vllm")

from scalellm_plugins.frontends import supervised_client  # noqa: E402
from scalellm_plugins.frontends.supervised import Listener, listen  # noqa: E402

pytestmark = pytest.mark.vllm

ENGINE = b"\0\0"
LIMIT_MS = 60_000


@pytest.fixture
def listeners(tmp_path: Path) -> Iterator[tuple[Listener, Listener]]:
    pair = listen(f"ipc://{tmp_path}/in"), listen(f"ipc://{tmp_path}/out")
    yield pair
    for listener in pair:
        listener.cleanup()


class Engine(threading.Thread):
    """The engine's side of one slot: says that it is ready, then answers utility calls.

    `stale` outputs were meant for a worker that is gone: they leave before the first answer.
    """

    def __init__(self, addresses: tuple[str, str], stale: list[Any], failure: str | None) -> None:
        super().__init__(daemon=True)
        self.addresses = addresses
        self.stale = stale
        self.failure = failure
        self.calls: list[Any] = []
        self.start()

    def run(self) -> None:
        from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

        encoder, decoder = MsgpackEncoder(), MsgpackDecoder()
        with zmq.Context() as context, context.socket(zmq.DEALER) as inputs:
            inputs.setsockopt(zmq.IDENTITY, ENGINE)
            inputs.connect(self.addresses[0])
            inputs.send(b"ready")
            with context.socket(zmq.PUSH) as outputs:
                outputs.connect(self.addresses[1])
                for output in self.stale:
                    outputs.send_multipart(encoder.encode(output))
                kind, *frames = inputs.recv_multipart(copy=False)
                _, call, method, arguments = decoder.decode(frames)
                self.calls.append((bytes(kind.buffer), method, tuple(arguments)))
                answer = UtilityOutput(call, failure_message=self.failure)
                if self.failure is None:
                    answer.result = UtilityResult(0)
                outputs.send_multipart(encoder.encode(EngineCoreOutputs(utility_output=answer)))
                outputs.send(b"after")


def _client(context: Any, listeners: tuple[Listener, Listener]) -> Any:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    sockets = []
    for kind, listener in zip((zmq.ROUTER, zmq.PULL), listeners, strict=True):
        made = supervised_client._AdoptingContext(context, listener.socket.dup().detach())
        sockets.append(made.socket(kind))
        sockets[-1].bind(listener.address)
    return SimpleNamespace(
        input_socket=sockets[0],
        resources=SimpleNamespace(output_socket=sockets[1], validate_alive=lambda frames: None),
        encoder=MsgpackEncoder(),
        decoder=MsgpackDecoder(EngineCoreOutputs),
        core_engines=[ENGINE],
    )


def _stale_outputs() -> list[Any]:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, UtilityOutput

    return [
        EngineCoreOutputs(outputs=[EngineCoreOutput("dead", [1, 2, 3])]),
        EngineCoreOutputs(utility_output=UtilityOutput(42, failure_message="for the dead")),
    ]


@pytest.mark.parametrize("failure", [None, "no such method"])
@pytest.mark.parametrize("engine_first", [True, False])
def test_a_later_worker_has_the_engine_abort_and_hears_nothing_meant_for_the_dead(
    listeners: tuple[Listener, Listener], engine_first: bool, failure: str | None
) -> None:
    """Whether the engine's connection waits for the worker, or comes after it."""
    addresses = listeners[0].address, listeners[1].address
    with zmq.Context() as context:
        if engine_first:
            engine = Engine(addresses, _stale_outputs(), failure)
        client = _client(context, listeners)
        with client.input_socket, client.resources.output_socket as outputs:
            payloads = {ENGINE: b"heard by an earlier worker"}
            shadow = zmq.Socket.shadow(client.input_socket)
            joined = supervised_client._Remembered(client, 3, shadow, payloads)
            if not engine_first:
                engine = Engine(addresses, _stale_outputs(), failure)
            assert joined.poll(LIMIT_MS) == 1
            assert joined.recv_multipart() == (ENGINE, b"heard by an earlier worker")
            assert outputs.poll(LIMIT_MS)
            assert outputs.recv_multipart() == [b"after"]
        engine.join()
    assert engine.calls == [(b"\x03", "scalellm_abort_client", (3,))]


def test_an_engine_that_never_comes_is_a_timeout(listeners: tuple[Listener, Listener]) -> None:
    with zmq.Context() as context:
        client = _client(context, listeners)
        with client.input_socket, client.resources.output_socket:
            shadow = zmq.Socket.shadow(client.input_socket)
            joined = supervised_client._Remembered(client, 0, shadow, {ENGINE: b""})
            assert joined.poll(20) == 0


def test_while_the_client_is_made_it_gets_the_slots_sockets_and_afterwards_vllms(
    listeners: tuple[Listener, Listener],
) -> None:
    """The first worker of a slot: the engine's own message is waited for, and remembered."""
    made: list[Any] = []

    def make_zmq_socket(context: Any, path: str, kind: int) -> Any:
        made.append(context.socket(kind))
        made[-1].bind(path)
        return made[-1]

    module: Any = SimpleNamespace(zmq=zmq, make_zmq_socket=make_zmq_socket)
    descriptors = {entry.address: entry.socket.dup().detach() for entry in listeners}
    addresses = listeners[0].address, listeners[1].address
    engine = Engine(addresses, [], None)  # before anybody adopts the sockets
    client = SimpleNamespace()
    with zmq.Context() as context:
        with supervised_client.adopted_sockets(module, client, 0, descriptors, {}) as payloads:
            inputs = module.make_zmq_socket(context, addresses[0], module.zmq.ROUTER)
            outputs = module.make_zmq_socket(context, addresses[1], module.zmq.PULL)
            shadow = module.zmq.Socket.shadow(inputs)
            assert shadow.poll(LIMIT_MS)
            assert shadow.recv_multipart() == [ENGINE, b"ready"]
        assert payloads == {ENGINE: b"ready"}
        assert (module.zmq, module.make_zmq_socket) == (zmq, make_zmq_socket)
        from vllm.v1.serial_utils import MsgpackEncoder

        call = MsgpackEncoder().encode((0, 1, "method", ()))
        inputs.send_multipart([ENGINE, b"\x03", *call])
        assert outputs.poll(LIMIT_MS)
        inputs.close(0)
        outputs.close(0)
        engine.join()
    client.utility_results[7] = "a future"
    assert client.utility_results.pop(7) == "a future"
    client.utility_results.pop(8).set_result("nobody waits")


async def test_only_the_first_reset_of_multimodal_caches_is_ignored() -> None:
    class Client:
        resets = 0

        async def reset_mm_cache_async(self) -> None:
            self.resets += 1

    client = Client()
    supervised_client.expect_no_reset(client)
    await client.reset_mm_cache_async()
    assert client.resets == 0
    await client.reset_mm_cache_async()
    assert client.resets == 1


async def test_an_engine_that_cannot_abort_does_not_stop_the_others() -> None:
    asked = []

    async def call(method: str, index: int, engine: bytes) -> None:
        asked.append((method, index, engine))
        await asyncio.sleep(0)
        if engine == b"1":
            raise RuntimeError("no such method")

    client = SimpleNamespace(core_engines=[b"0", b"1", b"2"], _call_utility_async=call)
    await supervised_client.abort_client(client, 5)
    assert asked == [("scalellm_abort_client", 5, engine) for engine in (b"0", b"1", b"2")]
