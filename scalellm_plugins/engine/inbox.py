"""What an engine's main loop takes its requests from: the frontends' rings, and everybody else's.

Takes the place of `EngineCoreProc.input_queue`. The main loop reads the rings itself, between two
steps: no thread wakes up for a request. What takes long to decode (long prompts, tensors, and with
them the hashing of their blocks) a thread does, and whatever the same frontend sends behind it
waits its turn. Without work the main loop sleeps on one eventfd, which everybody signals who has
something for it.
"""

from __future__ import annotations

import logging
import os
import queue
import struct
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from scalellm_plugins import messages
from scalellm_plugins.errors import ScaleLLMError
from scalellm_plugins.ipc.channel import frames_of
from scalellm_plugins.ipc.ring import signal
from scalellm_plugins.likes import LikesReceived

from .holding import HOLD

if TYPE_CHECKING:
    from scalellm_plugins.ipc.channel import Message

    from .outbox import Frontend, Outbox

logger = logging.getLogger("vllm.scalellm")

LONG_BYTES = 16 * 1024
"""Messages of more bytes are decoded in the thread: 4,000 prompt tokens, or a tensor."""

_ADDED = struct.Struct("<qq")
_carried = msgspec.msgpack.Decoder(list).decode
_AT_ONCE = 256


class Connected:
    """A frontend and what it has sent."""

    def __init__(self, index: int, frontend: Frontend, likes: LikesReceived) -> None:
        self.index = index
        self.likes = likes
        self.frontend = frontend
        self.channel = frontend.channel
        self.pending = 0
        """Messages that the thread has; what comes behind them must wait for it."""


class Inbox:
    """See the module.

    Args:
        engine: vLLM's `EngineCoreProc`.
        upstream: its input queue, emptied into this one.
        outbox: where the engine's answers go.
    """

    def __init__(self, engine: Any, upstream: Any, outbox: Outbox) -> None:
        from vllm import envs
        from vllm.multimodal.cache import MultiModalCacheMissError
        from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType
        from vllm.v1.serial_utils import MsgpackDecoder

        self._engine = engine
        self._outbox = outbox
        self._items: deque[Any] = deque()
        self._connected: tuple[Connected, ...] = ()
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._wake = signal(self.wake_fd)
        # Not thread-safe, hence one pair for the main loop and one for the thread.
        self._own, self._threads = (
            (MsgpackDecoder(EngineCoreRequest), MsgpackDecoder()) for _ in range(2)
        )
        self._kind = EngineCoreRequest
        self._miss = MultiModalCacheMissError
        self._columns = not envs.VLLM_COMPUTE_NANS_IN_LOGITS
        self._types = {
            messages.ADD: EngineCoreRequestType.ADD,
            messages.ADD_LIKE: EngineCoreRequestType.ADD,
            messages.ABORT: EngineCoreRequestType.ABORT,
            messages.UTILITY: EngineCoreRequestType.UTILITY,
        }
        self._long: queue.SimpleQueue[tuple[Connected, Message]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        while not upstream.empty():
            self._items.append(upstream.get_nowait())

    # vLLM's side: a queue

    def put_nowait(self, item: Any) -> None:
        """Add (request type, request); from any thread, and from signal handlers."""
        self._items.append(item)
        self._wake()

    put = put_nowait

    def empty(self) -> bool:
        """Whether `get` would wait; the main loop only, since it reads what is there to tell."""
        self._outbox.flush()
        if not self._items:
            self._read_all()
        return not self._items

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Return the next (request type, request); the main loop only.

        Raises:
            queue.Empty: there is none, and waiting is not asked for.
        """
        while True:
            self._outbox.flush()
            if not self._items:
                self._read_all()
            if self._items:
                return self._items.popleft()
            if not block or timeout is not None:
                raise queue.Empty
            if all(one.channel.consumer.park() for one in self._connected if not one.pending):
                os.read(self.wake_fd, 8)
            for one in self._connected:
                one.channel.consumer.unpark()

    def get_nowait(self) -> Any:
        """Return the next item without waiting.

        Raises:
            queue.Empty: there is none.
        """
        return self.get(block=False)

    # Frontends' side

    def connect(self, index: int, frontend: Frontend) -> None:
        """Read this frontend's ring from now on; from the thread that accepts frontends."""
        one = Connected(index, frontend, LikesReceived(self._kind))
        with self._lock:
            self._connected = (*self._connected, one)
        self._wake()  # it may sleep already, and this ring does not know

    def wake(self) -> None:
        """Have the main loop look: a frontend has died."""
        self._wake()

    def _read_all(self) -> None:
        for one in self._connected:
            if one.channel.dead:
                self._drop(one)
            elif not one.pending and one.channel.consumer.has_more():
                try:
                    self._read(one)
                except Exception:
                    # It hangs up and notices: what it has sent cannot be read, and is not lost
                    # silently.
                    logger.exception("frontend %d is cut off", one.index)
                    one.channel.dead = True
                    self._drop(one)

    def _read(self, one: Connected) -> None:
        channel = one.channel
        for _ in range(_AT_ONCE):
            message = channel.receive()
            if message is None:
                break
            if len(message.data) > LONG_BYTES:
                kept = message if not message.borrowed else _copied(message)
                self._hand_over(one, kept)
                break
            self._take(one, message, self._own)
        else:
            self._wake()
        channel.release()

    def _hand_over(self, one: Connected, message: Message) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._decode_long, name="scalellm-inbox", daemon=True
            )
            self._thread.start()
        one.pending += 1
        self._long.put((one, message))

    def _decode_long(self) -> None:
        while True:
            one, message = self._long.get()
            try:
                self._take(one, message, self._threads)
            except Exception:
                logger.exception("a message of frontend %d is lost", one.index)
            one.pending -= 1
            del one, message
            self._wake()

    def _take(self, one: Connected, message: Message, decoders: Any) -> None:
        """Decode a message and put what it says where the main loop finds it."""
        frames: Any = frames_of(message)
        added = message.kind in (messages.ADD, messages.ADD_LIKE)
        if message.borrowed and not added:
            frames = [bytes(frame) for frame in frames]
        typed, generic = decoders
        if added:
            item = self._request(one, frames, message, typed)
        elif message.kind == messages.ABORT:
            item = generic.decode(frames)
            one.frontend.forget(item)
            # Both queues, as vLLM's thread does: see EngineCore._process_aborts_queue.
            self._engine.aborts_queue.put_nowait(item)
        elif message.kind == messages.UTILITY:
            item = generic.decode(frames)
            one.frontend.calls.add(item[1])
        else:
            raise ScaleLLMError(f"message of unknown kind {message.kind}")
        if item is not None:
            self._items.append((self._types[message.kind], item))

    def _request(self, one: Connected, frames: Any, message: Message, decoder: Any) -> Any:
        """Make vLLM's request of a message; None if it was refused, and the frontend told so."""
        slot, number = _ADDED.unpack(frames[0])
        if message.kind == messages.ADD_LIKE:
            request = one.likes.make(number, _carried(frames[2]))
        else:
            rest = [bytes(frame) for frame in frames[2:]] if message.borrowed else frames[2:]
            request = decoder.decode(rest)
            one.likes.remember(number, request)
        if len(frames[1]):
            request.prompt_token_ids = frames[1].cast("i").tolist()
        engine = self._engine
        try:
            item = engine.preprocess_add_request(request)
        except self._miss as error:
            engine._handle_mm_cache_miss(request, error)
            return None
        except Exception:
            engine._handle_request_preproc_error(request)
            return None
        columns = slot >= 0 and self._columns and _fits_columns(request)
        one.frontend.admit(request.request_id, slot, columns)
        return item

    def _drop(self, one: Connected) -> None:
        """Forget a frontend that is gone, and have its requests aborted."""
        if one.pending:
            return  # the thread wakes us when it is done
        with self._lock:
            self._connected = tuple(other for other in self._connected if other is not one)
        requests = list(one.frontend.slots)
        self._outbox.disconnect(one.frontend)
        if requests:
            self._items.append((self._types[messages.ABORT], requests))


def _fits_columns(request: Any) -> bool:
    """Whether a request's outputs are one token each, as far as it tells."""
    params = request.sampling_params
    return (
        params is not None
        and params.logprobs is None
        and params.prompt_logprobs is None
        and request.trace_headers is None
        and not (params.extra_args and HOLD in params.extra_args)
    )


def _copied(message: Message) -> Message:
    return message._replace(data=memoryview(bytes(message.data)), borrowed=False)
