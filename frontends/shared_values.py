"""prometheus_client's values, kept in the memory of the worker's slot.

`prometheus_client.values.ValueClass` is how that library lets a server choose where values live.
Its own choice for several processes is a file per process: it loses the time of creation, reads
gauges by the clock of whoever set them last, and leaves the files of the dead. This one writes to
the slot's `Series`. In the supervisor a value belongs to no slot; a forked worker binds it.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec

from .shared_series import Series


class Key(msgspec.Struct, frozen=True, array_like=True):
    """What is known about a value: metric type, gauge mode, metric, sample, labels, help."""

    kind: str
    mode: str
    metric: str
    name: str
    labels: dict[str, str]
    text: str


class MessageClock:
    """When the engine sent what is being recorded, as seconds since the epoch; 0 for not now.

    Several workers hear from the engine and each sets the gauges when it gets to it. A late one
    must not replace what is newer; so a gauge set while a message is recorded carries the time of
    the message, not of the setting. `offset`, from the engine's monotonic clock, is taken before
    the workers are forked, so that all have the same.
    """

    def __init__(self) -> None:
        self.offset = time.time() - time.monotonic()
        self.sent = 0.0
        self._last = 0.0

    def heard(self, outputs: Any) -> None:
        """Note a message (`EngineCoreOutputs`), if it says how the scheduler is: few do."""
        if outputs.scheduler_stats is not None:
            self._last = outputs.timestamp + self.offset

    def follow(self, client: Any) -> None:
        """Note the time of every message that a client of the engine (an `AsyncMPClient`) gets."""
        get = client.get_output_async

        async def get_output_async() -> Any:
            outputs = await get()
            self.heard(outputs)
            return outputs

        client.get_output_async = get_output_async

    def during(self, record: Callable[..., None]) -> Callable[..., None]:
        """Wrap what records the last message."""

        def recorded(*args: Any, **kwargs: Any) -> None:
            self.sent = self._last
            try:
                record(*args, **kwargs)
            finally:
                self.sent = 0.0

        return recorded


clock = MessageClock()
_decode = msgspec.json.Decoder(Key).decode
_lock = threading.Lock()
_series: Series | None = None
_unbound: list[SlotValue] = []


class SlotValue:
    """One value, with the interface that prometheus_client asks for."""

    _multiprocess: ClassVar[bool] = True

    def __init__(
        self,
        typ: str,
        metric_name: str,
        name: str,
        labelnames: Any,
        labelvalues: Any,
        help_text: str,
        multiprocess_mode: str = "",
        **_: Any,
    ) -> None:
        labels = dict(zip(labelnames, map(str, labelvalues), strict=False))
        key = Key(
            typ, multiprocess_mode, metric_name, name, dict(sorted(labels.items())), help_text
        )
        self._key = msgspec.json.encode(key)
        self._counts = typ != "gauge"
        self._words: Any = array("d", (0.0, 0.0))
        self._at = 0
        with _lock:
            if _series is None:
                _unbound.append(self)
            else:
                self._bind(_series)

    def _bind(self, series: Series) -> None:
        value = self._words[0]
        self._at, fresh = series.at(self._key)
        self._words = series.words
        if fresh:
            # A counter's stamp is its time of creation, a gauge's when it was set.
            self._words[self._at + 1] = time.time() if self._counts else 0.0
            self._words[self._at] = value

    def inc(self, amount: float) -> None:
        """Add."""
        with _lock:
            self._words[self._at] += amount

    def set(self, value: float, timestamp: float | None = None) -> None:
        """Set; with a timestamp where the most recent of all workers' values counts."""
        with _lock:
            self._words[self._at] = value
            if timestamp:
                self._words[self._at + 1] = clock.sent or timestamp

    def set_exemplar(self, exemplar: Any) -> None:
        """Not kept, as by prometheus_client's own values for several processes."""

    def get(self) -> float:
        """Return this worker's (its slot's) value."""
        return float(self._words[self._at])

    def get_exemplar(self) -> None:
        """See `set_exemplar`."""


def install() -> None:
    """Have every metric that is made from now on use `SlotValue`; in the supervisor."""
    import prometheus_client.values

    prometheus_client.values.ValueClass = SlotValue


def bind(series: Series) -> None:
    """Be the worker whose slot has `series`; before anything is counted."""
    global _series
    with _lock:
        _series = series
        for raw, _, _ in series.read():
            if _decode(raw).mode.startswith("live"):  # what counts the living has no past
                series.words[series.at(raw)[0]] = 0.0
        for value in _unbound:
            value._bind(series)
        _unbound.clear()
    series.occupy(os.getpid())
