"""Any bytes in a ring: a reader gets records, or an error that names the bad one."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scalellm_plugins.ipc import channel, memory, peers, ring
from scalellm_plugins.ipc.channel import Message, MessageCorrupted, frames_of
from scalellm_plugins.ipc.ring import RingCorrupted

from .ipc_parts import CLIENT, ENGINE, FULL, SMALL, connected, leaving_nothing, listening, stranger

MANY = settings(max_examples=10_000 if FULL else 300)
SOME = settings(max_examples=3000 if FULL else 100)
"""Where an example takes system calls."""

POSITION = st.one_of(
    st.integers(0, 2**64 - 1),
    st.integers(0, 4 * SMALL),
    st.integers(0, SMALL // 8).map(lambda words: 8 * words),
    st.sampled_from([2**64 - 8, 2**63, 2**32, SMALL, SMALL + 8]),
)
HEADER = st.one_of(
    st.integers(0, 2**64 - 1),
    st.builds(
        lambda sequence, kind, size: sequence << 48 | kind << 32 | size,
        st.integers(0, 9),
        st.sampled_from([0, 1, ring.MAX_KIND, ring.FILLER]),
        st.one_of(st.integers(0, 2 * SMALL), st.integers(0, 2**32 - 1)),
    ),
)
CONTROL_WORDS = st.sampled_from(
    [ring._MAGIC, ring._CAPACITY, ring._TAIL, ring._HEAD, ring._PARKED, ring._STARVED]
)
CHANGE = st.one_of(
    st.tuples(CONTROL_WORDS, POSITION),
    st.tuples(st.just(ring._TAIL), POSITION),
    st.tuples(st.integers(0, SMALL // 8 - 1).map(lambda word: ring.CONTROL // 8 + word), HEADER),
    st.tuples(st.integers(0, 12).map(lambda word: ring.CONTROL // 8 + word), HEADER),
)
CHANGES = st.lists(CHANGE, min_size=1, max_size=6)
SIZES = st.lists(st.one_of(st.integers(0, 40), st.integers(0, SMALL // 2)), max_size=12)


def memory_of_a_ring() -> Any:
    fd = memory.create(ring.size_of(SMALL))
    try:
        return memory.attach(fd, ring.size_of(SMALL))
    finally:
        os.close(fd)


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or the error that may come of bytes."""
    try:
        return function(*arguments)
    except (RingCorrupted, MessageCorrupted) as error:
        return error


def read_all(consumer: ring.Consumer) -> bool:
    """Read until there is nothing, or the ring is corrupted (False): then it stays so."""
    for _ in range(SMALL):
        record = attempt(consumer.read)
        if record is None:
            return True
        if isinstance(record, RingCorrupted):
            assert f"record {consumer._sequence} at {consumer._next}: " in str(record)
            assert isinstance(attempt(consumer.read), RingCorrupted)
            return False
        bytes(record.data)
    raise AssertionError("more records than bytes")


@MANY
@given(SIZES, CHANGES, st.booleans())
def test_a_reader_of_any_ring(sizes: list[int], changes: list[Any], attached: bool) -> None:
    """`attached`: it has read something before the change, and holds it."""
    mapped = memory_of_a_ring()
    producer = ring.Producer(mapped, lambda: None)
    consumer = ring.Consumer(mapped, lambda: None) if attached else None
    for number, size in enumerate(sizes):
        if not producer.write(1, bytes([number]) * size):
            break
    if consumer is not None:
        consumer.read()
    words = memoryview(mapped).cast("Q")
    for index, value in changes:
        words[index] = value
    if consumer is None:
        consumer = attempt(ring.Consumer, mapped, lambda: None)
    if isinstance(consumer, ring.Consumer) and read_all(consumer):
        consumer.release()
        consumer.park()
        read_all(consumer)


@MANY
@given(st.binary(min_size=64, max_size=SMALL), POSITION)
@example(bytes(SMALL), SMALL)
def test_a_reader_of_any_bytes(data: bytes, tail: int) -> None:
    mapped = memory_of_a_ring()
    consumer = ring.Consumer(mapped, lambda: None)
    mapped[ring.CONTROL : ring.CONTROL + len(data)] = data
    memoryview(mapped).cast("Q")[ring._TAIL] = tail
    read_all(consumer)


def test_zeros_are_no_record() -> None:
    """A tail that says more than was written does not make records of memory nobody wrote."""
    mapped = memory_of_a_ring()
    consumer = ring.Consumer(mapped, lambda: None)
    memoryview(mapped).cast("Q")[ring._TAIL] = 8
    with pytest.raises(RingCorrupted, match=r"record 1 at 0: header 0x0000000000000000 says numb"):
        consumer.read()


def test_many_fillers_are_no_ring() -> None:
    """A reader would go through millions of them before it looked up."""
    mapped = memory_of_a_ring()
    consumer = ring.Consumer(mapped, lambda: None)
    words = memoryview(mapped).cast("Q")
    for sequence in range(1, 9):
        words[(ring.CONTROL >> 3) + sequence - 1] = sequence << 48 | ring.FILLER << 32
    words[ring._TAIL] = 64
    with pytest.raises(RingCorrupted, match=r"record 1 at 0: .*kind 65535, 0 bytes"):
        consumer.read()


@pytest.mark.parametrize("tail", [0, 8, 20, 24, 33, SMALL + 24, 2**64 - 8])
def test_a_writer_that_is_nowhere(tail: int) -> None:
    """Behind what was read, between words, further than the ring is long."""
    mapped = memory_of_a_ring()
    producer, consumer = (side(mapped, lambda: None) for side in (ring.Producer, ring.Consumer))
    for _ in range(2):
        producer.write(1, b"x" * 8)
        consumer.read()
    consumer.release(16)
    memoryview(mapped).cast("Q")[ring._TAIL] = tail
    with pytest.raises(RingCorrupted, match=f"record 3 at 32: the producer's position {tail} is"):
        consumer.read()


@pytest.mark.parametrize("head", [0, 8, 17, SMALL + 8, 2**64 - 8])
def test_a_reader_that_is_nowhere(head: int) -> None:
    """Behind what it has released, between words, before what was written."""
    mapped = memory_of_a_ring()
    producer, consumer = (side(mapped, lambda: None) for side in (ring.Producer, ring.Consumer))
    producer.write(1, b"x" * 8)
    consumer.read()
    consumer.release()
    assert producer.write(1, bytes(SMALL - 24))
    assert producer.reserve(SMALL // 2) is None  # it has seen that 16 bytes were released
    memoryview(mapped).cast("Q")[ring._HEAD] = head
    with pytest.raises(RingCorrupted, match=f"record 3 at {SMALL}: the consumer's position {head}"):
        producer.reserve(SMALL // 2)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (1 << 48 | 5 << 32 | 9, "number 1, kind 5, 9 bytes; published up to 16"),
        (1 << 48 | 5 << 32 | 0xFFFFFFFF, "kind 5, 4294967295 bytes"),
        (2 << 48 | 5 << 32 | 8, "number 2, kind 5"),
        (8, "number 0, kind 0, 8 bytes"),
    ],
)
def test_a_record_that_is_none(header: int, why: str) -> None:
    """Longer than what was published, or another number."""
    mapped = memory_of_a_ring()
    producer, consumer = (side(mapped, lambda: None) for side in (ring.Producer, ring.Consumer))
    producer.write(5, b"x" * 8)
    memoryview(mapped).cast("Q")[ring.CONTROL >> 3] = header
    with pytest.raises(RingCorrupted, match=f"record 1 at 0: header {header:#018x} says.*{why}"):
        consumer.read()


def test_a_record_that_goes_beyond_the_end() -> None:
    """Of the ring: what follows is published, but lies at its beginning."""
    mapped = memory_of_a_ring()
    producer, consumer = (side(mapped, lambda: None) for side in (ring.Producer, ring.Consumer))
    producer.write(5, bytes(SMALL - 24))
    consumer.read()
    consumer.release()
    for _ in range(2):
        producer.write(5, b"x" * 8)
    header = 2 << 48 | 5 << 32 | 24
    memoryview(mapped).cast("Q")[(ring.CONTROL + SMALL - 16) >> 3] = header
    with pytest.raises(RingCorrupted, match=f"record 2 at {SMALL - 16}: header {header:#018x}"):
        consumer.read()


@MANY
@given(st.lists(st.one_of(st.integers(0, SMALL - 8), POSITION.map(lambda head: (head,)))))
def test_a_writer_whose_reader_is_anything(steps: list[Any]) -> None:
    """Numbers write so many bytes; the others are where the reader says that it is."""
    mapped = memory_of_a_ring()
    producer = ring.Producer(mapped, lambda: None)
    words = memoryview(mapped).cast("Q")
    for step in steps:
        if isinstance(step, tuple):
            (words[ring._HEAD],) = step
            continue
        written = attempt(producer.write, 1, bytes(step))
        if isinstance(written, RingCorrupted):
            assert f"record {producer._sequence} at {producer.position}: " in str(written)
            assert f"consumer's position {words[ring._HEAD]} " in str(written)


def check_frames(data: bytes) -> None:
    found = attempt(frames_of, Message(77, memoryview(data), True))
    if isinstance(found, MessageCorrupted):
        assert f"message of kind 77, {len(data)} bytes: " in str(found)
    else:
        (count,) = struct.unpack_from("<Q", data)
        assert [len(frame) for frame in found] == [*struct.unpack_from(f"<{count}Q", data, 8)]


@MANY
@given(st.binary(max_size=200))
def test_frames_of_any_bytes(data: bytes) -> None:
    check_frames(data)


@SOME
@given(
    st.lists(st.binary(max_size=50), max_size=5),
    st.lists(st.tuples(st.integers(0, 6), POSITION), min_size=1, max_size=3),
    st.integers(0, 300),
)
def test_frames_of_a_message_that_was_changed(
    content: list[bytes], changes: list[Any], cut: int
) -> None:
    with connected() as (here, there):
        here.channel.put(1, content)
        message = there.channel.receive()
        assert message is not None
        data = bytearray(message.data)
    for word, value in changes:
        if 8 * word + 8 <= len(data):
            struct.pack_into("<Q", data, 8 * word, value)
    check_frames(bytes(data[: max(0, len(data) - cut)]))


@SOME
@given(
    st.one_of(st.binary(max_size=32), st.builds(struct.Struct("<QQ").pack, POSITION, POSITION)),
    st.lists(st.tuples(st.binary(max_size=12), st.integers(0, 2)), max_size=3),
    st.booleans(),
)
def test_segments_of_any_bytes(record: bytes, said: list[Any], hangs_up: bool) -> None:
    """A record says anything, and anything comes by the socket."""
    with leaving_nothing(), connected() as (here, there):
        for data, descriptors in said:
            fds = [memory.create(SMALL) for _ in range(descriptors)]
            socket.send_fds(here.channel.peer.socket, [data], fds)
            for fd in fds:
                os.close(fd)
        here.channel.producer.write(5 | channel.SEGMENT, record)
        if hangs_up:
            here.channel.close()
        with pytest.raises(MessageCorrupted, match="message of kind 5, record that ends at"):
            assert there.channel.receive() is None


@SOME
@given(st.binary(max_size=60), st.integers(0, 4))
def test_a_handshake_of_any_bytes(data: bytes, descriptors: int) -> None:
    address = "test-any-bytes"
    with leaving_nothing(), listening(address) as listener, stranger(address) as sock:
        fds = [memory.create(ring.size_of(SMALL)) for _ in range(descriptors)]
        socket.send_fds(sock, [data], fds)
        for fd in fds:
            os.close(fd)
        sock.shutdown(socket.SHUT_WR)
        with pytest.raises(peers.PeerError, match=f"frontend {CLIENT} "):
            peers.accept(listener, CLIENT, ENGINE)
