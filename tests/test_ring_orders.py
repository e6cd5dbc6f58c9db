"""No order of two processes' loads and stores loses a wake-up, or shows half of a record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from scalellm_plugins.ipc import ring

from .ipc_parts import FULL
from .memory_models import (
    FENCE,
    LOAD,
    SIGNAL,
    STORE,
    WAIT,
    Deadlock,
    Port,
    StoreBuffers,
    Views,
    attach,
    explore,
)

WRITER, READER = 0, 1

SCENARIOS = [
    pytest.param(64, [8, 8], 1, id="room for all"),
    pytest.param(32, [24, 24], 1, id="each fills the ring"),
    pytest.param(32, [0, 24], 1, id="a filler, then the whole ring"),
]
if FULL:  # minutes
    SCENARIOS += [
        pytest.param(32, [8, 8, 8], 1, id="two fit"),
        pytest.param(32, [8, 8, 8], 2, id="two are released together"),
        pytest.param(32, [0, 8, 24], 1, id="a filler, and a record before it"),
        pytest.param(64, [8, 8, 8], 1, id="room for all three"),
        pytest.param(32, [8, 8, 8, 8], 1, id="twice around"),
    ]


def writer(capacity: int, sizes: list[int], change: Callable[[Any], None]) -> Callable[..., None]:
    """Write records of so many bytes, all words of a record its number; sleep while it is full."""

    def run(port: Port) -> None:
        producer = attach(ring.Producer, port, capacity, lambda: port(SIGNAL, READER))
        change(producer)
        for number, size in enumerate(sizes, start=1):
            while (room := producer.reserve(size)) is None:
                port(WAIT)
            room.write(number)  # type: ignore[attr-defined]
            producer.publish(number)

    return run


def reader(
    capacity: int, sizes: list[int], at_once: int, change: Callable[[Any], None]
) -> Callable[..., None]:
    """Read them, release up to so many at once, and sleep while there are none."""

    def run(port: Port) -> None:
        consumer = attach(ring.Consumer, port, capacity, lambda: port(SIGNAL, WRITER))
        change(consumer)
        number = 0
        while True:
            for _ in range(at_once):
                record: Any = consumer.read()
                if record is None:
                    break
                number += 1
                found = (record.kind, record.data.read())
                assert found == (number, [number] * (sizes[number - 1] + 7 >> 3))
            consumer.release()
            if number == len(sizes):
                return
            if consumer.park():
                port(WAIT)
            consumer.unpark()

    return run


def nothing(side: Any) -> None:
    pass


def check(
    model: Any,
    capacity: int,
    sizes: list[int],
    at_once: int = 1,
    change: Callable[[Any], None] = nothing,
) -> int:
    programs = writer(capacity, sizes, change), reader(capacity, sizes, at_once, change)
    return explore(model(), programs)


@pytest.fixture(params=[StoreBuffers, Views], ids=["x86-64", "AArch64"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ring, "WEAK", request.param is Views)
    return request.param


@pytest.mark.parametrize(("capacity", "sizes", "at_once"), SCENARIOS)
def test_no_order_loses_a_wake_up_or_shows_half_a_record(
    model: Any, capacity: int, sizes: list[int], at_once: int
) -> None:
    assert check(model, capacity, sizes, at_once) > 1000


def no_fences(side: Any) -> None:
    side._fence = lambda: None


def test_the_models_find_what_fences_prevent(model: Any) -> None:
    with pytest.raises((Deadlock, AssertionError, ring.RingCorrupted)):
        check(model, 64, [8, 8], change=no_fences)


def test_plain_stores_are_not_enough_on_aarch64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the second model would prove nothing that the first does not."""
    monkeypatch.setattr(ring, "WEAK", False)
    with pytest.raises((AssertionError, ring.RingCorrupted)):
        check(Views, 64, [8, 8])


class Recorder:
    """Memory without surprises, and who did what with it."""

    def __init__(self, memory: dict[int, int]) -> None:
        self.memory = memory
        self.done: list[tuple[Any, ...]] = []

    def __call__(self, *operation: Any) -> Any:
        self.done.append(operation)
        what, *rest = operation
        if what == STORE:
            self.memory[rest[0]] = rest[1]
        return self.memory.get(rest[0], 0) if what == LOAD else None

    def fence(self) -> None:
        self(FENCE)

    def unfenced(self, loads: Callable[[int], bool], stores: Callable[[int], bool]) -> int:
        """How often such a store follows such a load with no fence between them."""
        found = 0
        loaded = False
        for what, *rest in self.done:
            if what == FENCE:
                loaded = False
            elif what == LOAD and loads(rest[0]):
                loaded = True
            elif what == STORE and stores(rest[0]):
                found += loaded
        return found


def is_record(index: int) -> bool:
    return index >= ring.CONTROL >> 3


def test_no_store_passes_a_load_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `Views` cannot show: a record is overwritten, or given back, before it was read."""
    monkeypatch.setattr(ring, "WEAK", True)
    memory: dict[int, int] = {}
    ports: list[Any] = [Recorder(memory), Recorder(memory)]
    producer = attach(ring.Producer, ports[WRITER], 64, lambda: None)
    consumer = attach(ring.Consumer, ports[READER], 64, lambda: None)
    for size in [8, 0, 24, 40, 8, 56, 16] * 5:
        for _ in range(3):
            if (room := producer.reserve(size)) is not None:
                room.write(1)  # type: ignore[attr-defined]
                producer.publish(1)
        while (record := consumer.read()) is not None:
            record.data.read()  # type: ignore[attr-defined]
        consumer.release()
    assert ports[WRITER].unfenced(lambda index: index == ring._HEAD, is_record) == 0
    assert ports[READER].unfenced(is_record, lambda index: index == ring._HEAD) == 0
