"""The ring against a list: sizes, wraps, full, empty, releases in any portions, sleeping sides."""

from __future__ import annotations

import _thread
import os
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scalellm_plugins.ipc import memory, ring

from .ipc_parts import FULL, SMALL, mappings, shared_memory

SIZES = st.one_of(
    st.integers(0, 40),
    st.integers(0, SMALL),
    st.sampled_from([SMALL // 2 - 8, SMALL // 2, SMALL - 16, SMALL - 9, SMALL - 8]),
)


def length(size: int) -> int:
    """Bytes that a record takes."""
    return 8 + -(-size // 8) * 8


class RingAgainstList(RuleBasedStateMachine):
    """`unread` and `held` are the list; `tail` and `head` count bytes, as the ring does."""

    weak = False

    @initialize()
    def start(self) -> None:
        self.restored = ring.WEAK
        ring.WEAK = self.weak
        self.wakes: list[str] = []
        here, there = mappings(SMALL)
        self.producer = ring.Producer(here, lambda: self.wakes.append("reader"))
        self.consumer = ring.Consumer(there, lambda: self.wakes.append("writer"))
        self.unread: list[tuple[int, bytes, int]] = []
        self.held: list[tuple[ring.Record, bytes]] = []
        self.tail = self.head = self.read_to = 0
        self.filler = (0, 0)
        """Where the last one begins and ends."""
        self.parked = False
        self.number = 0

    def teardown(self) -> None:
        if hasattr(self, "producer"):
            ring.WEAK = self.restored
            self.producer.close()
            self.consumer.close()  # views may still be held
            for record, content in self.held:
                assert bytes(record.data) == content

    def expect_wakes(self, *wakes: str) -> None:
        assert self.wakes == list(wakes)
        self.wakes.clear()

    def give_back(self, end: int) -> None:
        """What a release does, if there is anything to it."""
        begin, behind = self.filler  # goes with what is before it, if it was read
        self.head = behind if end == begin and self.read_to >= behind else end
        self.held = [(record, content) for record, content in self.held if record.end > end]

    @rule(size=SIZES, kind=st.integers(0, ring.MAX_KIND), fill=st.integers(0, 255))
    def write(self, size: int, kind: int, fill: int) -> None:
        if size > SMALL - 8:
            with pytest.raises(ValueError, match=f"record of {size} bytes"):
                self.producer.reserve(size)
            return None
        self.number += 1
        content = (bytes([fill, self.number & 255]) * (size // 2 + 1))[:size]
        to_end = SMALL - self.tail % SMALL
        wakes = []
        if to_end < length(size):
            if SMALL - (self.tail - self.head) < to_end:
                return self.refuse(kind, content, wakes)
            self.filler = (self.tail, self.tail + to_end)
            self.tail += to_end
            wakes += ["reader"] * self.parked
            self.parked = False
        if SMALL - (self.tail - self.head) < length(size):
            return self.refuse(kind, content, wakes)
        assert self.producer.write(kind, content)
        self.tail += length(size)
        self.unread.append((kind, content, self.tail))
        wakes += ["reader"] * self.parked
        self.parked = False
        self.expect_wakes(*wakes)
        return None

    def refuse(self, kind: int, content: bytes, wakes: list[str]) -> None:
        assert not self.producer.write(kind, content)
        assert self.starved()
        self.expect_wakes(*wakes)

    def starved(self) -> bool:
        """Whether the writer waits for a release. It may be content again before one comes."""
        return bool(self.producer._words[ring._STARVED])

    @rule(more=st.sampled_from([-8, -1, 0, 1, 8]), fill=st.integers(0, 255))
    def write_to_the_end(self, more: int, fill: int) -> None:
        """Where records meet the end of the ring, or miss it by a byte or a word."""
        self.write(max(0, SMALL - self.tail % SMALL - 8 + more), 1, fill)

    @rule()
    def reserve_and_think_again(self) -> None:
        """What was reserved and not published was never there."""
        if SMALL - self.tail % SMALL >= 16 and SMALL - (self.tail - self.head) >= 16:
            view = self.producer.reserve(8)
            assert view is not None
            view[:] = b"\xff" * 8

    @rule()
    def ask_for_room(self) -> None:
        self.producer.ask_for_room()
        assert self.starved()

    @rule(most=st.integers(1, 5))
    def read(self, most: int) -> None:
        for _ in range(most):
            wakes = self.pass_filler()
            record = self.consumer.read()
            self.expect_wakes(*wakes)
            if record is None:
                assert not self.unread
                assert not self.consumer.has_more()
                return
            kind, content, end = self.unread.pop(0)
            assert (record.kind, bytes(record.data), record.end) == (kind, content, end)
            self.held.append((record, content))
            self.read_to = end

    def pass_filler(self) -> list[str]:
        """One at the reader's place is read with what follows, and given back if nothing is held.

        It is there even where nothing follows it yet.
        """
        begin, end = self.filler
        if begin != self.read_to or end == begin:
            return []
        self.read_to = end
        if self.head != begin:
            return []
        self.head = end
        return ["writer"] * self.starved()

    @rule()
    def release_all(self) -> None:
        wakes = ["writer"] * self.starved()
        self.consumer.release()
        self.give_back(self.read_to)
        self.held.clear()
        self.expect_wakes(*wakes)
        assert not self.starved()

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 10**6))
    def release_some(self, number: int) -> None:
        wakes = ["writer"] * self.starved()
        end = self.held[number % len(self.held)][0].end
        self.consumer.release(end)
        self.give_back(end)
        self.expect_wakes(*wakes)

    @rule(by=st.integers(1, 10**6))
    def release_what_is_not_there(self, by: int) -> None:
        for end in (self.head - by, self.read_to + by):
            with pytest.raises(ValueError, match="release up to"):
                self.consumer.release(end)

    @rule()
    def park(self) -> None:
        self.parked = self.consumer.park()
        assert self.parked == (self.read_to == self.tail)
        assert self.parked != self.consumer.has_more()

    @rule()
    def unpark(self) -> None:
        self.consumer.unpark()
        self.parked = False

    @invariant()
    def nobody_writes_over_what_is_held(self) -> None:
        for record, content in getattr(self, "held", ()):
            assert bytes(record.data) == content

    @invariant()
    def positions_agree(self) -> None:
        if hasattr(self, "producer"):
            assert (self.producer.position, self.producer.released) == (self.tail, self.head)
            assert not self.wakes


class WeakRingAgainstList(RingAgainstList):
    """With the fences that only other processors need."""

    weak = True


SETTINGS = settings(max_examples=2000 if FULL else 100, stateful_step_count=60)
RingAgainstList.TestCase.settings = WeakRingAgainstList.TestCase.settings = SETTINGS
TestRing = RingAgainstList.TestCase
TestWeakRing = WeakRingAgainstList.TestCase


Pair = tuple[ring.Producer, ring.Consumer]


def nothing() -> None:
    pass


@pytest.fixture
def pair() -> Iterator[Pair]:
    here, there = mappings(SMALL)
    made = ring.Producer(here, nothing), ring.Consumer(there, nothing)
    yield made
    for side in made:
        side.close()


def contents(consumer: ring.Consumer) -> list[bytes]:
    found = []
    while (record := consumer.read()) is not None:
        found.append(bytes(record.data))
        consumer.release()
    return found


def test_sequence_numbers_begin_anew(pair: Pair) -> None:
    producer, consumer = pair
    for number in range(0x10000 + 100):
        assert producer.write(1, b"%d" % number)
        record = consumer.read()
        assert record is not None
        assert record.data == b"%d" % number
        consumer.release()


def test_positions_are_words_of_64_bits(pair: Pair) -> None:
    """Not of 32, nor the 53 of a float: after weeks of traffic they are not small any more."""
    producer, consumer = pair
    for side in pair:
        side._words[ring._TAIL] = side._words[ring._HEAD] = 2**64 - 4 * SMALL
        side._tail = side._head = 2**64 - 4 * SMALL
    consumer._next = consumer._head
    for number in range(20):
        assert producer.write(1, bytes([number]) * 600)
        assert contents(consumer) == [bytes([number]) * 600]


def test_nothing_is_published_that_was_not_reserved(pair: Pair) -> None:
    producer, consumer = pair
    with pytest.raises(AssertionError):
        producer.publish(1)
    assert producer.write(1, b"x")
    with pytest.raises(AssertionError):
        producer.publish(1)
    assert producer.write(1, bytes(SMALL - 40))
    assert producer.reserve(8) is not None
    assert producer.reserve(16) is None
    with pytest.raises(AssertionError):
        producer.publish(1)
    assert len(contents(consumer)) == 2


@pytest.mark.parametrize("kind", [-1, ring.FILLER, 2**16])
def test_kinds_stay_within_their_bits(pair: Pair, kind: int) -> None:
    producer, consumer = pair
    with pytest.raises(AssertionError):
        producer.write(kind, b"x")
    assert producer.write(ring.MAX_KIND, b"y")
    assert contents(consumer) == [b"y"]


@pytest.mark.parametrize("capacity", [0, -4096, 2048, 4097, 6144, 1 << 32])
def test_capacities_that_no_ring_has(capacity: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        ring.size_of(capacity)


@pytest.mark.parametrize("extra", [-4096, 8, 1000, 8192])
def test_memory_that_is_no_ring(extra: int) -> None:
    """Even if it says so itself."""
    fd = memory.create(ring.size_of(4096) + extra)
    mapped = memory.attach(fd, ring.size_of(4096) + extra)
    os.close(fd)
    words = (ring.MAGIC, len(mapped) - ring.CONTROL)
    mapped[:16] = b"".join(word.to_bytes(8, "little") for word in words)
    for side in (ring.Producer, ring.Consumer):
        with pytest.raises(ValueError, match="power of two"):
            side(mapped, nothing)


@pytest.mark.parametrize("words", [(1, 4096), (ring.MAGIC, 8192)])
def test_a_ring_of_somebody_else(words: tuple[int, int]) -> None:
    for side in (ring.Producer, ring.Consumer):
        mapped, _ = mappings(4096)
        mapped[:16] = b"".join(word.to_bytes(8, "little") for word in words)
        with pytest.raises(ring.RingCorrupted, match="not a ring of 4096 bytes"):
            side(mapped, nothing)


def test_a_ring_is_used_once() -> None:
    """A second producer would begin at a position that the consumer has passed."""
    here, there = mappings(SMALL)
    producer = ring.Producer(here, nothing)
    assert producer.write(1, b"x")
    with pytest.raises(ring.RingCorrupted, match="one producer"):
        ring.Producer(there, nothing)
    assert contents(ring.Consumer(there, nothing)) == [b"x"]
    with pytest.raises(ring.RingCorrupted, match="one consumer"):
        ring.Consumer(here, nothing)


def test_a_record_outlives_the_ring_for_as_long_as_it_is_held() -> None:
    before = shared_memory()
    here, there = mappings(SMALL)
    producer, consumer = ring.Producer(here, nothing), ring.Consumer(there, nothing)
    del here, there
    assert producer.write(1, b"held")
    record = consumer.read()
    assert record is not None
    producer.close()
    consumer.close()
    consumer.close()
    assert record.data == b"held"
    assert len(shared_memory()) == len(before) + 1
    del record, producer, consumer
    assert shared_memory() == before


def test_signal_makes_an_eventfd_readable() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    wake = ring.signal(fd)
    wake()
    wake()
    assert os.eventfd_read(fd) == 2
    os.close(fd)


# Threads and signal handlers that come in between


class Lock:
    """A lock that says when it was released."""

    def __init__(self, released: Callable[[], None]) -> None:
        self._lock = _thread.allocate_lock()
        self._released = released

    def acquire(self) -> None:
        assert self._lock.acquire(timeout=10), "somebody else has it"

    def release(self) -> None:
        self._lock.release()
        self._released()


class Interrupted(Exception):
    """Out of a signal handler."""


def test_two_threads_use_two_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python may switch to the other in the middle of a fence."""
    pairs: list[Pair] = []
    switches = 0

    def other_thread() -> None:
        nonlocal switches
        switching, pairs[:] = pairs[:], []
        for producer, consumer in switching:
            switches += 1
            assert producer.write(1, b"other")
            assert contents(consumer) == [b"other"]
        pairs[:] = switching

    locks = SimpleNamespace(allocate_lock=lambda: Lock(other_thread))
    monkeypatch.setattr(ring, "_thread", locks)
    (here, there), (here2, there2) = mappings(SMALL), mappings(SMALL)
    mine = ring.Producer(here, nothing), ring.Consumer(there, nothing)
    pairs.append((ring.Producer(here2, nothing), ring.Consumer(there2, nothing)))
    for _ in range(10):
        assert mine[0].write(1, b"mine")
        assert contents(mine[1]) == [b"mine"]
    assert switches >= 20


@pytest.mark.parametrize("weak", [False, True])
def test_a_signal_handler_raises_in_a_fence(weak: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fence of each call in turn: what was written is whole, and the ring goes on."""
    monkeypatch.setattr(ring, "WEAK", weak)
    left = -1

    def handler() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Interrupted

    monkeypatch.setattr(ring, "_thread", SimpleNamespace(allocate_lock=lambda: Lock(handler)))
    here, there = mappings(SMALL)
    producer, consumer = ring.Producer(here, nothing), ring.Consumer(there, nothing)
    interrupted = 0
    for number in range(300):
        content = bytes([number % 256]) * (1000 + number)
        written = read = False
        left = number % 7
        try:
            assert producer.write(1, content)
            written = True
        except Interrupted:
            interrupted += 1
        left = -1
        assert contents(consumer) in ([content], *([] if written else [[]]))
        assert producer.write(1, b"next")
        left = number % 7
        try:
            read = consumer.read() is not None
            consumer.release()
        except Interrupted:
            interrupted += 1
        left = -1
        assert contents(consumer) in ([], *([] if read else [[b"next"]]))
        consumer.release()
    assert interrupted > 50


def test_signals_come_at_any_time(pair: Pair) -> None:
    """The same with real ones."""
    producer, consumer = pair
    armed = False

    def handler(*_: Any) -> None:
        if armed:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 5e-5, 5e-5)
    interrupted = 0
    try:
        for number in range(10_000):
            content = b"%d" % number * (number % 50)
            written = None
            try:
                armed = True
                written = producer.write(1, content)
                armed = False
            except Interrupted:
                interrupted += 1
            armed = False
            found = contents(consumer)
            assert found == [content] or (written is None and not found)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 10
