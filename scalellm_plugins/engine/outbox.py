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

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from scalellm_plugins import messages
from scalellm_plugins.ipc.channel import Channel

from .holding import STATS_S, only_gauges

SPARED = ("finish_reason", "prefill_stats", "events", "kv_transfer_params")
"""Fields of an output that change from step to step; what else it may have, it has from its first
token on (`_is_plain`)."""


class Frontend:
    """One connected frontend, as the engine sees it."""

    def __init__(self, channel: Channel, engine_index: int, encode: Callable[[Any], Any]) -> None:
        self.channel = channel
        self.slots: dict[str, int] = {}
        """Of its requests that the engine has not finished; negative: not as columns."""
        self.fresh: set[str] = set()
        """Requests whose outputs have not been looked at yet."""
        self.calls: set[int] = set()
        """Utility calls that came by the ring: their results go back by it."""
        self._engine_index = engine_index
        self._encode = encode
        self._weight_version: Any = None
        self._stats_sent = 0.0
        self._waiting: deque[tuple[int, Any]] = deque()

    def admit(self, request: Any, slot: int, columns: bool) -> None:
        """Note a request. `columns`: its outputs may go as columns, if they turn out plain."""
        self.slots[request.request_id] = slot if columns else messages.NO_SLOT
        if columns:
            self.fresh.add(request.request_id)

    def forget(self, request_ids: Sequence[str]) -> None:
        """Requests were aborted."""
        for request_id in request_ids:
            self.slots.pop(request_id, None)
            self.fresh.discard(request_id)

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
        if outputs.outputs:
            outputs.outputs = self._sort(outputs.outputs, slots, tokens)
        frames = self._general(outputs, bool(slots))
        timestamp = outputs.timestamp
        if not slots:
            if frames:
                self._send(messages.OUTPUTS, frames)
        elif len(frames) < 2:
            self._send(messages.STEP, (timestamp, slots, tokens, frames[0] if frames else b""))
        else:
            columns = bytearray(messages.step_size(len(slots), 0))
            messages.write_step(memoryview(columns), timestamp, slots, tokens, b"")
            self._send(messages.FRAMED_STEP, [columns, *frames])
        return True

    def _sort(self, outputs: list[Any], slots: list[int], tokens: list[int]) -> list[Any]:
        """Put plain outputs into the columns; return the others."""
        slot_of = self.slots.get
        fresh = self.fresh
        others = []
        for output in outputs:
            slot = slot_of(output.request_id, -1)
            new = output.new_token_ids
            if (
                slot < 0
                or output.finish_reason is not None
                or len(new) != 1
                or output.prefill_stats is not None
                or output.events is not None
                or output.kv_transfer_params is not None
            ):
                others.append(output)
                if output.finish_reason is not None:
                    self.slots.pop(output.request_id, None)
                    fresh.discard(output.request_id)
                continue
            if fresh and output.request_id in fresh:
                fresh.discard(output.request_id)
                if not _is_plain(output):
                    self.slots[output.request_id] = messages.NO_SLOT
                    others.append(output)
                    continue
            slots.append(slot)
            tokens.append(new[0])
        return others

    def _general(self, outputs: Any, columns: bool) -> Sequence[Any]:
        """Encode what columns do not say; nothing, if there is nothing."""
        stats = outputs.scheduler_stats
        if stats is not None and columns and not outputs.outputs:
            # Gauges alone, while tokens flow: a look at them every 50 ms is enough.
            if outputs.timestamp - self._stats_sent < STATS_S and only_gauges(stats):
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
        if self.channel.dead:
            return True
        if kind != messages.STEP:
            return self.channel.send(kind, content)
        timestamp, slots, tokens, general = content
        producer = self.channel.producer
        size = messages.step_size(len(slots), len(general))
        if size > self.channel.large:
            columns = bytearray(size - len(general))
            messages.write_step(memoryview(columns), timestamp, slots, tokens, b"")
            frames = [columns, general] if general else [columns]
            return self.channel.send(messages.FRAMED_STEP, frames)
        view = producer.reserve(size)
        if view is None:
            return False
        messages.write_step(view, timestamp, slots, tokens, general)
        producer.publish(kind)
        return True


def _is_plain(output: Any) -> bool:
    """Whether an output has nothing but what `SPARED` and the columns say."""
    for field in output.__struct_fields__[2:]:
        value = getattr(output, field)
        if field not in SPARED and value is not None and value != 0:
            return False
    return True


class Outbox:
    """See the module. `queue` is vLLM's, for everything that no ring takes."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._frontends: dict[int, Frontend] = {}
        # The main loop's own; threads that answer utility calls or report errors use it, too.
        self._lock = threading.Lock()

    def connect(self, index: int, frontend: Frontend) -> None:
        """From now on outputs for this frontend go by its ring."""
        with self._lock:
            self._frontends[index] = frontend

    def disconnect(self, index: int, frontend: Frontend) -> None:
        """The frontend is gone; a successor may have its place already."""
        with self._lock:
            if self._frontends.get(index) is frontend:
                del self._frontends[index]
            frontend.channel.close()

    def put_nowait(self, item: Any) -> None:
        """Take what the engine has for a client, (index, `EngineCoreOutputs`), or its last word."""
        if type(item) is tuple:
            frontend = self._frontends.get(item[0])
            if frontend is not None:
                with self._lock:
                    if frontend.channel.dead or frontend.deliver(item[1]):
                        return
        self._queue.put_nowait(item)

    put = put_nowait

    def flush(self) -> None:
        """Send what waits for room."""
        with self._lock:
            for frontend in self._frontends.values():
                frontend.flush()

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """For vLLM's output thread: the next item for its sockets."""
        return self._queue.get(*args, **kwargs)

    def empty(self) -> bool:
        """Whether vLLM's queue is empty."""
        return bool(self._queue.empty())
