"""An API server's end of the shared-memory connections to its engines.

Beside vLLM's client of the engine, not in its place: requests, aborts and utility calls to a
connected engine leave by its ring, and what it sends is read in the callback of one eventfd. The
sockets stay for what comes without a ring: an engine on another machine, its last word, the
coordinator of data parallelism.

Whoever wants the outputs is the `sink`: vLLM's own task (`patch_v1_engine_core_client_ring.py`), or
the fast lane (`link.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import select
import struct
from array import array
from typing import Any, NamedTuple, Protocol

import zmq

from scalellm_plugins import messages
from scalellm_plugins.errors import ScaleLLMError
from scalellm_plugins.ipc import peers
from scalellm_plugins.ipc.channel import Channel, Message, frames_of

logger = logging.getLogger("vllm.scalellm")

_SLOT = struct.Struct("<q")
_AT_ONCE = 64
"""Messages in a row, before connections get their turn."""

TO_ENGINE, FROM_ENGINE = 1 << 20, 1 << 20
"""Bytes of a ring: 500 steps of 256 tokens, or 200 short prompts. Larger messages go beside it."""


class Columns(NamedTuple):
    """A step's plain outputs: who gets which token."""

    timestamp: float
    receivers: list[Any]
    """As given to `EngineRings.add`; None for a request that has ended here."""
    tokens: list[int]


class Sink(Protocol):
    """Who takes what engines send."""

    def on_step(self, step: Columns, general: Any, rings: EngineRings) -> None:
        """Columns; `general`: the step's `EngineCoreOutputs` with the rest, or None."""

    def on_outputs(self, outputs: Any) -> None:
        """An `EngineCoreOutputs` without columns."""

    def on_end(self) -> None:
        """All that is here for now was given."""

    def on_dead(self, error: Exception) -> None:
        """An engine has ended."""


class _Engine:
    """One connected engine."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        # Readable when its process has ended, or hung up. The socket alone would be readable
        # whenever the descriptor of a large message comes.
        self.end = select.epoll()
        self.end.register(channel.peer.pidfd, select.EPOLLIN)
        self.end.register(channel.peer.socket, select.EPOLLRDHUP)
        self.weight_version: Any = None
        self.slots: list[int] = []
        """Of its last step."""
        self.receivers: list[Any] = []
        """For those slots, as long as `ended` has not changed."""
        self.ended = 0


class EngineRings:
    """All connected engines of one of vLLM's clients; `requests`: slot → whoever asked."""

    def __init__(self, client: Any, wake_fd: int, engines: dict[bytes, _Engine]) -> None:
        self._client = client
        self._wake_fd = wake_fd
        self._engines = engines
        self._slots = itertools.count()
        self.requests: dict[int, Any] = {}
        self._slot_of: dict[str, int] = {}
        self._ended = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self.sink: Sink | None = None

    @classmethod
    def connect(cls, client: Any) -> EngineRings | None:
        """Connect to every engine of this client that lets it; None where there is none."""
        address = client.resources.output_socket.getsockopt(zmq.LAST_ENDPOINT)
        address = address.decode().rstrip("\0")
        wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        engines: dict[bytes, _Engine] = {}
        missing = []
        for identity in client.core_engines:
            index = int.from_bytes(identity, "little")
            sizes = (TO_ENGINE, FROM_ENGINE)
            try:
                peer = peers.connect(address, client.client_index, index, wake_fd, sizes)
            except (ScaleLLMError, OSError) as error:
                logger.warning("no shared memory to engine %d: %s", index, error)
                peer = None
            if peer is None:
                missing.append(str(index))
            else:
                engines[identity] = _Engine(Channel(peer))
        if missing:
            logger.info("engine %s: by vLLM's sockets, not shared memory", ", ".join(missing))
        if not engines:
            os.close(wake_fd)
            return None
        return cls(client, wake_fd, engines)

    def start(self, sink: Sink) -> None:
        """Read from now on, in the running event loop, for `sink`; again: for another."""
        self.sink = sink
        if self._loop is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._wake_fd, self._read)
        for identity, engine in self._engines.items():
            self._loop.add_reader(engine.end.fileno(), self._died, identity)
        self._loop.call_soon(self._read)

    def close(self) -> None:
        """Hang up; engines drop what they still have for this client."""
        if self._loop is not None:
            self._loop.remove_reader(self._wake_fd)
            self._loop = None
            os.close(self._wake_fd)
        for identity in list(self._engines):
            self._forget_engine(identity)

    # To engines

    def reaches(self, engine: bytes) -> bool:
        """Whether messages to this engine go by its ring."""
        return engine in self._engines

    def add(self, engine: bytes, request: Any, receiver: Any = None) -> None:
        """Send a request. `receiver`: whom `on_step` finds in `requests`; by default the id."""
        slot = next(self._slots)
        request_id = request.request_id
        ids = request.prompt_token_ids
        request.prompt_token_ids = None
        try:
            frames = self._client.encoder.encode(request)
        finally:
            request.prompt_token_ids = ids
        prompt = array("i", ids) if ids else b""
        self.requests[slot] = request_id if receiver is None else receiver
        self._slot_of[request_id] = slot
        self._engines[engine].channel.put(messages.ADD, [_SLOT.pack(slot), prompt, *frames])

    def send(self, engine: bytes, kind: int, frames: Any) -> None:
        """Send an encoded message."""
        self._engines[engine].channel.put(kind, frames)

    def forget(self, request_id: str) -> None:
        """A request has ended or was aborted: what still comes for it is dropped."""
        slot = self._slot_of.pop(request_id, None)
        if slot is not None:
            self.requests.pop(slot, None)
            self._ended += 1

    # From engines

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        again = False
        for identity, engine in list(self._engines.items()):
            try:
                again |= self._read_one(engine)
            except ScaleLLMError as error:
                logger.error("engine %d is lost: %s", int.from_bytes(identity, "little"), error)
                self._lose(identity)
        if self.sink is not None:
            self.sink.on_end()
        if again and self._loop is not None:
            self._loop.call_soon(self._read)

    def _read_one(self, engine: _Engine) -> bool:
        """Give out what an engine has sent; whether there is more."""
        channel = engine.channel
        channel.consumer.unpark()
        channel.flush()
        for _ in range(_AT_ONCE):
            message = channel.receive()
            if message is None:
                if channel.consumer.park():
                    return False
                continue
            self._take(engine, message)
            channel.release()
        return True

    def _take(self, engine: _Engine, message: Message) -> None:
        sink = self.sink
        assert sink is not None
        decode = self._client.decoder.decode
        if message.kind == messages.STEP:
            step = messages.decode_step(message.data)
            general = None if step.general is None else decode(step.general)
        elif message.kind in (messages.FRAMED_STEP, messages.OUTPUTS):
            frames: list[Any] = list(frames_of(message))
            if message.borrowed:
                frames = [bytes(frame) for frame in frames]
            if message.kind == messages.OUTPUTS:
                general = decode(frames)
                self._settle(engine, general)
                sink.on_outputs(general)
                return
            step = messages.decode_step(frames[0])
            general = decode(frames[1:]) if frames[1:] else None
        else:
            raise ScaleLLMError(f"message of unknown kind {message.kind}")
        columns = Columns(step.timestamp, self._receivers(engine, step), step.tokens)
        if general is not None:
            self._settle(engine, general)
        sink.on_step(columns, general, self)

    def _receivers(self, engine: _Engine, step: messages.Step) -> list[Any]:
        """Look up who gets a step's tokens; mostly those who got the tokens before."""
        if step.slots is not None:
            engine.slots = step.slots
        if step.slots is not None or engine.ended != self._ended:
            receiver_of = self.requests.get
            engine.ended = self._ended
            engine.receivers = [receiver_of(slot) for slot in engine.slots]
        if len(engine.receivers) != len(step.tokens):
            raise messages.StepCorrupted(
                f"step of {len(step.tokens)} tokens for {len(engine.slots)} slots"
            )
        return engine.receivers

    def _settle(self, engine: _Engine, outputs: Any) -> None:
        engine.weight_version = getattr(outputs, "weight_version", None)
        for output in outputs.outputs:
            if output.finish_reason is not None:
                self.forget(output.request_id)

    def weight_version(self) -> Any:
        """The version of the weights of the last step, where vLLM tells it."""
        return next(iter(self._engines.values())).weight_version if self._engines else None

    # Ends

    def _died(self, identity: bytes) -> None:
        """An engine has ended: read its last words, then tell."""
        engine = self._engines.get(identity)
        if engine is None:
            return
        with contextlib.suppress(ScaleLLMError):
            while self._read_one(engine):
                pass
        self._lose(identity)

    def _lose(self, identity: bytes) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        self._forget_engine(identity)
        if self._client._finalizer.alive and not self._client.resources.engine_dead:
            self._client.resources.engine_dead = True
            if self.sink is not None:
                self.sink.on_dead(EngineDeadError())

    def _forget_engine(self, identity: bytes) -> None:
        engine = self._engines.pop(identity)
        if self._loop is not None:
            self._loop.remove_reader(engine.end.fileno())
        engine.end.close()
        engine.channel.close()
