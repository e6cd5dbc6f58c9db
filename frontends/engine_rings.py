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

import msgspec
import zmq

from scalellm_plugins import messages
from scalellm_plugins.errors import ScaleLLMError
from scalellm_plugins.ipc import peers
from scalellm_plugins.ipc.channel import BESIDE_BYTES, Channel, Message, frames_of
from scalellm_plugins.likes import UNNUMBERED, LikesSent

logger = logging.getLogger("vllm.scalellm")

_ADDED = struct.Struct("<qq")
_encode = msgspec.msgpack.Encoder().encode
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
    ended: list[Any]
    """`EngineCoreOutput` of requests whose last this is."""
    engine: int = 0
    """Whose step it is: vLLM's engine index."""
    more: bool = False
    """Whether the engine's next message is here already."""


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

    def __init__(self, channel: Channel, likes: LikesSent) -> None:
        self.channel = channel
        self.likes = likes
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
        self._reading = tuple(engines.values())
        from vllm.v1.engine import EngineCoreOutput, FinishReason

        self._output, self._reason = EngineCoreOutput, FinishReason
        self._loop: asyncio.AbstractEventLoop | None = None
        self.sink: Sink | None = None

    @classmethod
    def connect(cls, client: Any) -> EngineRings | None:
        """Connect to every engine of this client that lets it; None where there is none."""
        from vllm.v1.engine import EngineCoreRequest

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
                likes = LikesSent(EngineCoreRequest)
                engines[identity] = _Engine(Channel(peer, BESIDE_BYTES), likes)
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
        for engine in self._reading:
            self._loop.add_reader(engine.end.fileno(), self._died, engine)
        self._loop.call_soon(self._read)

    def close(self) -> None:
        """Hang up; engines drop what they still have for this client."""
        if self._loop is not None:
            self._loop.remove_reader(self._wake_fd)
            self._loop = None
            os.close(self._wake_fd)
        for engine in self._reading:
            self._forget_engine(engine)

    # To engines

    def reaches(self, engine: bytes) -> bool:
        """Whether messages to this engine go by its ring."""
        return engine in self._engines

    def add(self, engine: bytes, request: Any, receiver: Any = None) -> None:
        """Send a request. `receiver`: whom `on_step` finds in `requests`; by default the id."""
        to = self._engines[engine]
        slot = next(self._slots)
        request_id = request.request_id
        ids = request.prompt_token_ids
        # The lane's only: of those, many have the same object for their parameters.
        number, known = (UNNUMBERED, False) if receiver is None else to.likes.number(request)
        request.prompt_token_ids = None
        try:
            if known:
                kind, frames = messages.ADD_LIKE, [_encode(to.likes.carried(request))]
            else:
                kind, frames = messages.ADD, self._client.encoder.encode(request)
            prompt = array("i", ids) if ids else b""
            to.channel.put(kind, [_ADDED.pack(slot, number), prompt, *frames])
        except BaseException:
            to.likes.forget()
            raise
        finally:
            request.prompt_token_ids = ids
        self.requests[slot] = request_id if receiver is None else receiver
        self._slot_of[request_id] = slot

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
        try:  # noqa: SIM105 (once per step: a context manager would cost more than the rest)
            os.eventfd_read(self._wake_fd)
        except BlockingIOError:
            pass
        again = False
        for engine in self._reading:
            try:
                again |= self._read_one(engine)
            except ScaleLLMError as error:
                logger.error("engine %d is lost: %s", engine.channel.peer.index, error)
                self._lose(engine)
        if self.sink is not None:
            self.sink.on_end()
        if again and self._loop is not None:
            self._loop.call_soon(self._read)

    def _read_one(self, engine: _Engine) -> bool:
        """Give out what an engine has sent; whether there is more."""
        channel = engine.channel
        consumer = channel.consumer
        consumer.unpark()
        if channel.backlog:
            channel.flush()
        for _ in range(_AT_ONCE):
            message = channel.receive()
            if message is None:
                if consumer.park():
                    return False
            elif message.kind == messages.STEP:
                step = messages.decode_step(message.data)
                consumer.release()
                self._give(engine, step, None if step.general is None else [step.general])
            else:
                self._take(engine, message)
                consumer.release()
        return True

    def _take(self, engine: _Engine, message: Message) -> None:
        """Give out a message of frames."""
        frames: list[Any] = list(frames_of(message))
        if message.borrowed:
            frames = [bytes(frame) for frame in frames]
        if message.kind == messages.FRAMED_STEP:
            self._give(engine, messages.decode_step(frames[0]), frames[1:])
        elif message.kind == messages.OUTPUTS:
            general = self._client.decoder.decode(frames)
            self._settle(engine, general)
            assert self.sink is not None
            self.sink.on_outputs(general)
        else:
            raise ScaleLLMError(f"message of unknown kind {message.kind}")

    def _give(self, engine: _Engine, step: messages.Step, frames: list[Any] | None) -> None:
        """Give out a step, and what of it is in frames."""
        receivers = self._receivers(engine, step)
        ended = [] if step.ends is None else self._ended_outputs(step.ends)
        general = None
        if frames:
            general = self._client.decoder.decode(frames)
            self._settle(engine, general)
        assert self.sink is not None
        channel = engine.channel
        more = channel.consumer.has_more()
        columns = Columns(step.timestamp, receivers, step.tokens, ended, channel.peer.index, more)
        self.sink.on_step(columns, general, self)

    def _ended_outputs(self, ends: list[messages.End]) -> list[Any]:
        """Make vLLM's outputs of requests that end; those that have ended here get none."""
        outputs = []
        for end in ends:
            receiver = self.requests.get(end.slot)
            if receiver is not None:
                request_id = receiver if isinstance(receiver, str) else receiver.request_id
                reason = self._reason(end.reason)
                outputs.append(
                    self._output(request_id, end.tokens, finish_reason=reason, stop_reason=end.stop)
                )
                self.forget(request_id)
        return outputs

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

    def _died(self, engine: _Engine) -> None:
        """An engine has ended: read its last words, then tell."""
        if engine not in self._reading:
            return
        with contextlib.suppress(ScaleLLMError):
            while self._read_one(engine):
                pass
        self._lose(engine)

    def _lose(self, engine: _Engine) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        self._forget_engine(engine)
        if self._client._finalizer.alive and not self._client.resources.engine_dead:
            self._client.resources.engine_dead = True
            if self.sink is not None:
                self.sink.on_dead(EngineDeadError())

    def _forget_engine(self, engine: _Engine) -> None:
        self._reading = tuple(other for other in self._reading if other is not engine)
        self._engines = {
            identity: other for identity, other in self._engines.items() if other is not engine
        }
        if self._loop is not None:
            self._loop.remove_reader(engine.end.fileno())
        engine.end.close()
        engine.channel.close()
