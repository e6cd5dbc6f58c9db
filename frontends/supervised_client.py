"""vLLM's client of the engine, in a worker whose slot may have had other workers before.

An engine connects once to every slot and says once, in its first message, that it is ready. vLLM's
client waits for that message while it is constructed. For the first worker of a slot all is as
upstream; for a later one

- the listening sockets are adopted from the supervisor, so the engine's reconnection is already
  waiting there when the worker comes up;
- the ready message is the one that an earlier worker heard;
- instead of waiting for it, the client has every engine abort what the slot's last worker left
  behind, and waits for the answer. The answer proves both directions of the connection, and since
  messages to a slot keep their order, whatever comes before it was meant for the dead and is
  thrown away.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import zmq

logger = logging.getLogger("vllm.scalellm")

ABORT_CLIENT = "scalellm_abort_client"
"""The method that patch_engine_core.py adds to the engine."""

_CONNECT_CHECK_S = 0.002


@contextmanager
def adopted_sockets(
    module: Any, client: Any, index: int, listeners: Mapping[str, int], ready: Any
) -> Iterator[dict[bytes, bytes]]:
    """While vLLM's client is constructed: sockets from `listeners`, ready messages from `ready`.

    `module` is vLLM's core_client, whose global names `zmq` and `make_zmq_socket` are changed for
    the duration: the constructor runs on the only thread that uses them. `ready` maps engine
    identities to their messages, empty in the first worker. Yields the same mapping, filled by the
    end of the block.
    """
    payloads: dict[bytes, bytes] = dict(ready)
    real_zmq, make = module.zmq, module.make_zmq_socket

    def shadow(sock: Any) -> Any:
        real: Any = zmq.Socket.shadow(sock)
        return _Remembered(client, index, real, payloads) if ready else _Heard(real, payloads)

    def make_zmq_socket(ctx: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        if path in listeners:
            ctx = _AdoptingContext(ctx, listeners[path])
        return make(ctx, path, *args, **kwargs)

    module.zmq = _Zmq(shadow)
    module.make_zmq_socket = make_zmq_socket
    try:
        yield payloads
    finally:
        module.zmq, module.make_zmq_socket = real_zmq, make
    client.utility_results = _Results()


async def abort_client(client: Any, index: int) -> None:
    """Have every engine abort the requests of the worker in slot `index`."""
    for engine in client.core_engines:
        try:
            await client._call_utility_async(ABORT_CLIENT, index, engine=engine)
        except Exception as error:
            # The slot's next worker asks again.
            logger.warning("requests of API server %d could not be aborted: %s", index, error)


def expect_no_reset(client: Any) -> None:
    """Ignore the reset of multimodal caches that vLLM sends when an API server starts.

    It is meant for an engine that has only profiled yet. Later, others' requests are running.
    """

    async def reset() -> None:
        del client.reset_mm_cache_async  # from now on the class's again

    client.reset_mm_cache_async = reset


class _Zmq:
    """The module zmq, but for `Socket.shadow`."""

    def __init__(self, shadow: Callable[[Any], Any]) -> None:
        self.Socket = SimpleNamespace(shadow=shadow)

    def __getattr__(self, name: str) -> Any:
        return getattr(zmq, name)


class _AdoptingContext:
    """A ZMQ context whose socket adopts a listening descriptor when it is bound.

    Works in every release; vLLM's own `listener=` parameter exists since 0.32.
    """

    def __init__(self, context: Any, descriptor: int) -> None:
        self._context = context
        self._descriptor = descriptor

    def socket(self, kind: int) -> Any:
        made = self._context.socket(kind)
        made.setsockopt(zmq.USE_FD, self._descriptor)
        return made


class _Heard:
    """The input socket, noting the ready messages that pass."""

    def __init__(self, socket: Any, payloads: dict[bytes, bytes]) -> None:
        self.poll = socket.poll
        self._socket = socket
        self._payloads = payloads

    def recv_multipart(self) -> Any:
        identity, payload = message = self._socket.recv_multipart()
        self._payloads[identity] = payload
        return message


class _Remembered:
    """In place of the input socket: ready messages from memory, once the engines have answered."""

    def __init__(
        self, client: Any, index: int, inputs: Any, payloads: Mapping[bytes, bytes]
    ) -> None:
        self._client = client
        self._index = index
        self._inputs = inputs
        self._left = [(engine, payloads[engine]) for engine in client.core_engines]
        self._joined = False

    def poll(self, timeout: float) -> int:
        """Join at the first call; `timeout` in ms. 0 if an engine did not answer in time."""
        if not self._joined:
            deadline = time.monotonic() + timeout / 1000
            self._joined = _rejoin(self._client, self._index, self._inputs, deadline)
        return int(self._joined)

    def recv_multipart(self) -> tuple[bytes, bytes]:
        return self._left.pop(0)


def _rejoin(client: Any, index: int, inputs: Any, deadline: float) -> bool:
    """Have every engine abort what the slot's last worker left; drop outputs until they have.

    Returns False at the deadline (of `time.monotonic`).
    """
    from vllm.v1.engine import EngineCoreRequestType

    outputs: Any = zmq.Socket.shadow(client.resources.output_socket)
    waiting = set()
    for engine in client.core_engines:
        call = uuid.uuid1().int >> 64
        arguments = client.encoder.encode((index, call, ABORT_CLIENT, (index,)))
        message = (engine, EngineCoreRequestType.UTILITY.value, *arguments)
        if not _send_once_connected(inputs, message, deadline):
            return False
        waiting.add(call)
    while waiting:
        if not outputs.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return False
        frames = outputs.recv_multipart(copy=False)
        client.resources.validate_alive(frames)
        answer = client.decoder.decode(frames).utility_output
        if answer is not None and answer.call_id in waiting:
            waiting.discard(answer.call_id)
            if answer.failure_message is not None:
                # An engine on a node without this plugin: requests of the dead run to their end.
                logger.warning("%s: %s", ABORT_CLIENT, answer.failure_message)
    return True


def _send_once_connected(inputs: Any, message: tuple[Any, ...], deadline: float) -> bool:
    """Send to an engine as soon as it is connected: a ROUTER drops messages to those that are not.

    There is no event for a particular peer's arrival, only the refusal to send to it.
    """
    inputs.setsockopt(zmq.ROUTER_MANDATORY, 1)
    try:
        while True:
            try:
                inputs.send_multipart(message)
                return True
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                if time.monotonic() > deadline:
                    return False
                time.sleep(_CONNECT_CHECK_S)
    finally:
        inputs.setsockopt(zmq.ROUTER_MANDATORY, 0)


class _Results(dict[int, Any]):
    """Futures of utility calls; an answer to a call of the slot's last worker is dropped.

    With vLLM's plain dict it would end the task that reads the engine's outputs.
    """

    def pop(self, key: int, *default: Any) -> Any:
        return super().pop(key, *(default or (_Nobody(),)))


class _Nobody:
    """Takes a result that nobody waits for."""

    def set_result(self, result: Any) -> None:
        pass

    def set_exception(self, error: BaseException) -> None:
        pass
