"""What an engine's main loop puts its outputs into: frontends' rings, or else vLLM's queue.

Takes the place of `EngineCoreProc.output_queue`. For a frontend that is connected by shared memory
the main loop writes the step itself, a few µs; no thread wakes up. For all others, and for whatever
is not for a frontend (the coordinator, the end of the engine), vLLM's queue, thread and sockets are
as ever.

Never blocks: what finds no room waits here, per frontend and in order, and goes out as soon as the
frontend has read on. It is bounded by the requests that run: of a step that waits, 8 bytes per
token are kept.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import msgspec

from scalellm_plugins import messages
from scalellm_plugins.errors import ScaleLLMError
from scalellm_plugins.ipc.channel import Channel

from .holding import STATS_S, can_wait
from .plain import PlainOutputs, whole

logger = logging.getLogger("vllm.scalellm")

SPARED = ("finish_reason", "stop_reason")
"""Fields of an output that change from step to step, and are looked at every time; so are events
and the prefill's statistics. What else an output may have, it has with the end, or with every
token."""

_UNSEEN = -2
"""A request's slot, as `_UNSEEN - slot`, until one of its outputs was looked at."""


class Frontend:
    """One connected frontend, as the engine sees it."""

    def __init__(self, channel: Channel, engine_index: int, encode: Callable[[Any], Any]) -> None:
        self.channel = channel
        self.slots: dict[str, int] = {}
        """Of its requests that the engine has not finished; negative: not as columns (yet)."""
        self.calls: set[int] = set()
        """Utility calls that came by the ring: their results go back by it."""
        self._engine_index = engine_index
        self._encode = encode
        self._weight_version: Any = None
        self._stats_sent = 0.0
        self._last_slots: list[int] = []
        self._plain: tuple[list[str], list[int]] = ([], [])
        """Requests of the lean step's last outputs, and their slots."""
        self._waiting: deque[tuple[int, Any]] = deque()
        self._warned = False

    def admit(self, request_id: str, slot: int, columns: bool) -> None:
        """Note a request. `columns`: its outputs may go as columns, if they turn out plain."""
        self.slots[request_id] = _UNSEEN - slot if columns else messages.NO_SLOT
        self._plain = ([], [])

    def forget(self, request_ids: Sequence[str]) -> None:
        """Requests were aborted."""
        for request_id in request_ids:
            self.slots.pop(request_id, None)

    def deliver(self, outputs: Any) -> bool:
        """Send `EngineCoreOutputs`, or keep them until there is room. False: not for the ring."""
        call = outputs.utility_output
        if call is not None:
            if call.call_id not in self.calls:
                return False
            self.calls.discard(call.call_id)
        outputs.engine_index = self._engine_index
        slots: list[int] = []
        tokens: list[int] = []
        ends: list[messages.End] = []
        made = outputs.outputs
        if type(made) is PlainOutputs:
            slots, tokens = self._columns(made)
            made = made.others if slots else made.whole()
        if made:
            more, news, others = self._sort(made)
            slots, tokens = slots + more, tokens + news
            made = self._sort_out_ends(others, ends) if others else others
        outputs.outputs = made
        frames = self._general(outputs, bool(slots or ends))
        if not slots and not ends:
            if frames:
                self._send(messages.OUTPUTS, frames)
            return True
        step = messages.Step(outputs.timestamp, slots, tokens, ends or None)
        if slots is self._last_slots or slots == self._last_slots:
            step.slots = None
        else:
            self._last_slots = slots
        if len(frames) > 1:
            self._send(messages.FRAMED_STEP, [messages.encode_step(step), *frames])
            return True
        if frames:
            step.general = bytes(frames[0])
        self._send(messages.STEP, messages.encode_step(step))
        return True

    def _columns(self, made: PlainOutputs) -> tuple[list[int], list[int]]:
        """Slots and tokens of plain outputs; nothing, where some were never looked at."""
        ids, slots = self._plain
        if made.ids is not ids and made.ids != ids:
            slot_of = self.slots.get
            slots = [slot_of(id_, -1) for id_ in made.ids]
            if min(slots) < 0:
                return [], []
            self._plain = (made.ids, slots)
        return slots, made.tokens

    def _sort(self, outputs: list[Any]) -> tuple[list[int], list[int], list[Any]]:
        """Sort outputs into columns of slots and tokens, and others.

        By comprehensions over one field each, 0.1 µs per output: a loop over outputs takes three
        times that.
        """
        others = [
            output
            for output in outputs
            if output.finish_reason is not None or output.events is not None
        ]
        if others:
            outputs = [
                output
                for output in outputs
                if output.finish_reason is None and output.events is None
            ]
        slot_of = self.slots.get
        slots = [slot_of(output.request_id, -1) for output in outputs]
        try:
            if not slots or min(slots) >= 0:
                return slots, [token for (token,) in [o.new_token_ids for o in outputs]], others
        except ValueError:
            pass  # not one token each
        return self._sort_each(outputs, slots, others)

    def _sort_each(
        self, outputs: list[Any], found: list[int], others: list[Any]
    ) -> tuple[list[int], list[int], list[Any]]:
        slots, tokens = [], []
        for output, known in zip(outputs, found, strict=True):
            slot = known
            new = output.new_token_ids
            if known <= _UNSEEN and output.prefill_stats is None and new:
                slot = _UNSEEN - known if _is_plain(output) else messages.NO_SLOT
                self.slots[output.request_id] = slot
            if slot < 0 or len(new) != 1:
                others.append(output)
            else:
                slots.append(slot)
                tokens.append(new[0])
        return slots, tokens, others

    def _sort_out_ends(self, others: list[Any], ends: list[messages.End]) -> list[Any]:
        """Take out of `others` the last outputs that are no more than that."""
        left = []
        for output in others:
            reason = output.finish_reason
            if reason is None:
                left.append(output)
                continue
            slot = self.slots.pop(output.request_id, -1)
            stop = output.stop_reason
            if slot >= 0 and not isinstance(stop, str) and _is_plain(output):
                ends.append(messages.End(slot, output.new_token_ids, reason, stop))
            else:
                left.append(output)
        return left

    def _general(self, outputs: Any, columns: bool) -> Sequence[Any]:
        """Encode what columns do not say; nothing, if there is nothing."""
        stats = outputs.scheduler_stats
        if stats is not None and columns and not outputs.outputs:
            # Gauges alone, while tokens flow: a look at them every 50 ms is enough.
            if outputs.timestamp - self._stats_sent < STATS_S and can_wait(stats):
                stats = outputs.scheduler_stats = None
            else:
                self._stats_sent = outputs.timestamp
        version = getattr(outputs, "weight_version", None)
        if (
            stats is None
            and not outputs.outputs
            and outputs.utility_output is None
            and not outputs.finished_requests
            and outputs.wave_complete is None
            and outputs.start_wave is None
            and version == self._weight_version
        ):
            return ()
        self._weight_version = version
        return self._encode(outputs)  # type: ignore[no-any-return]

    @property
    def waits(self) -> bool:
        """Whether something waits for room."""
        return bool(self._waiting)

    def _send(self, kind: int, content: Any) -> None:
        self.flush()
        if self._waiting or not self._write(kind, content):
            self._waiting.append((kind, content))

    def flush(self) -> None:
        """Send what waits, as far as there is room now."""
        while self._waiting:
            if not self._write(*self._waiting[0]):
                return
            self._waiting.popleft()

    def _write(self, kind: int, content: Any) -> bool:
        channel = self.channel
        if channel.dead:
            return True
        try:
            return self._write_to(channel, kind, content)
        except OSError as error:  # no memory or descriptor for a segment: perhaps later
            if not self._warned:
                self._warned = True
                logger.warning("a message waits: %s", error)
            return False
        except ScaleLLMError:
            logger.exception("frontend %d is cut off", channel.peer.index)
            channel.dead = True  # the inbox aborts its requests
            return True

    @staticmethod
    def _write_to(channel: Channel, kind: int, content: Any) -> bool:
        if kind != messages.STEP:
            return channel.send(kind, content)
        if len(content) > channel.large:
            return channel.send(messages.FRAMED_STEP, [content])
        return channel.producer.write(kind, content)


def _is_plain(output: Any) -> bool:
    """Whether an output has nothing but what `SPARED` and the columns say."""
    return all(getattr(output, name) is default for name, default in _defaults(output.__class__))


@functools.cache
def _defaults(kind: Hashable) -> tuple[tuple[str, Any], ...]:
    """What a plain output has in its fields: msgspec takes 100 µs to tell."""
    fields = msgspec.structs.fields(kind)[2:]  # type: ignore[arg-type]
    return tuple((field.name, field.default) for field in fields if field.name not in SPARED)


class Outbox:
    """See the module. `queue` is vLLM's, for everything that no ring takes."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._frontends: dict[int, Frontend] = {}
        """Replaced, not changed: the main loop goes through it without the lock."""
        # The main loop's own; threads that answer utility calls or report errors use it, too.
        self._lock = threading.Lock()

    def connect(self, index: int, frontend: Frontend) -> None:
        """From now on outputs for this frontend go by its ring."""
        with self._lock:
            self._frontends = {**self._frontends, index: frontend}

    def disconnect(self, frontend: Frontend) -> None:
        """The frontend is gone; a successor may have its place already."""
        with self._lock:
            self._frontends = {
                other: one for other, one in self._frontends.items() if one is not frontend
            }
            frontend.channel.close()

    def put_nowait(self, item: Any) -> None:
        """Take what the engine has for a client, (index, `EngineCoreOutputs`), or its last word."""
        if type(item) is tuple:
            frontend = self._frontends.get(item[0])
            if frontend is not None:
                with self._lock:
                    if frontend.channel.dead or frontend.deliver(item[1]):
                        return
            item[1].outputs = whole(item[1].outputs)
        self._queue.put_nowait(item)

    put = put_nowait

    def flush(self) -> None:
        """Send what waits for room; the main loop looks before every step."""
        for frontend in self._frontends.values():
            if frontend.waits:
                break
        else:
            return
        with self._lock:
            for frontend in self._frontends.values():
                frontend.flush()

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """For vLLM's output thread: the next item for its sockets."""
        return self._queue.get(*args, **kwargs)

    def empty(self) -> bool:
        """Whether vLLM's queue is empty."""
        return bool(self._queue.empty())
