"""Segments that are not what their records say, and processes that can open nothing more."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from scalellm_plugins.ipc import channel, memory
from scalellm_plugins.ipc.channel import MAX_KIND, Message, frames_of

from .ipc_parts import SMALL, End, connected, leaving_nothing, received


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    with leaving_nothing():
        yield


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    with connected() as both:
        yield both


def limit(descriptors: int) -> None:
    """Let this process open so many more."""
    free = []
    for _ in range(descriptors + 1):
        free.append(os.dup(0))
    for fd in free:
        os.close(fd)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free), hard))


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("left", [0, 1])
def test_a_receiver_without_descriptors(
    ends: tuple[End, End], limited: Callable[[int], None], left: int
) -> None:
    """None for the segment, or none for its mapping."""
    here, there = ends
    here.channel.put(7, [bytes(SMALL)])
    limited(left)
    with pytest.raises(channel.MessageCorrupted, match="segment of a message of kind 7, record"):
        there.channel.receive()


def test_a_sender_without_descriptors(
    ends: tuple[End, End], limited: Callable[[int], None]
) -> None:
    here, there = ends
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limited(0)
    with pytest.raises(OSError, match="Too many open files"):
        here.channel.put(7, [b"x" * SMALL])
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    here.channel.put(8, [b"y" * SMALL])
    assert received(there) == [(8, [b"y" * SMALL])]


def segment(size: int, seals: bool = True) -> int:
    if seals:
        return memory.create(size)
    fd = os.memfd_create("scalellm-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


@pytest.mark.parametrize(
    ("make", "number", "why"),
    [
        (lambda: [segment(100)], 1, "of 100 bytes"),
        (lambda: [segment(5000)], 1, "of 5000 bytes"),
        (lambda: [segment(4096, seals=False)], 1, "cannot shrink"),
        (lambda: [os.open("/dev/null", os.O_RDONLY)], 1, "not a memfd"),
        (list, 1, "no descriptor"),
        (lambda: [segment(4096)], 2, "number 1, is gone"),
        (lambda: [segment(4096)], 0, "Resource temporarily unavailable"),
    ],
)
def test_a_segment_that_is_not_what_its_record_says(
    ends: tuple[End, End], make: Callable[[], list[int]], number: int, why: str
) -> None:
    here, there = ends
    fds = make()
    socket.send_fds(here.channel.peer.socket, [struct.pack("<Q", number)], fds)
    for fd in fds:
        os.close(fd)
    here.channel.producer.write(3 | channel.SEGMENT, struct.pack("<QQ", 4096, 1))
    with pytest.raises(channel.MessageCorrupted, match=f"message of kind 3, record.*{why}"):
        there.channel.receive()


@pytest.mark.parametrize("payload", [b"", b"x" * 8, b"x" * 17, bytes(16)])
def test_a_segment_record_that_says_nothing(ends: tuple[End, End], payload: bytes) -> None:
    here, there = ends
    here.channel.producer.write(3 | channel.SEGMENT, payload)
    with pytest.raises(channel.MessageCorrupted, match="segment of a message of kind 3"):
        there.channel.receive()


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "unpack requires"),
        (struct.pack("<QQQ", 4097, 1, 4096), "4097 bytes in memory of 4096"),
        (struct.pack("<QQQ", 8, 1, 8192), "shared memory of 4096 bytes"),
        (struct.pack("<QQQ", 8, 2, 4096), "Resource temporarily unavailable"),
    ],
)
def test_memory_beside_the_ring_that_is_not_what_its_record_says(
    ends: tuple[End, End], payload: bytes, why: str
) -> None:
    here, there = ends
    fd = segment(4096)
    socket.send_fds(here.channel.peer.socket, [struct.pack("<Q", 1)], [fd])
    os.close(fd)
    here.channel.producer.write(3 | channel.BESIDE, payload)
    with pytest.raises(channel.MessageCorrupted, match=f"message of kind 3, record.*{why}"):
        there.channel.receive()


def test_a_segment_of_nothing(ends: tuple[End, End]) -> None:
    here, there = ends
    fd = os.memfd_create("scalellm-test", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    socket.send_fds(here.channel.peer.socket, [struct.pack("<Q", 1)], [fd])
    os.close(fd)
    here.channel.producer.write(3 | channel.SEGMENT, struct.pack("<QQ", 0, 1))
    with pytest.raises(channel.MessageCorrupted, match="of 0 bytes"):
        there.channel.receive()


def test_frames_of_nothing() -> None:
    assert frames_of(Message(1, memoryview(bytes(8)), True)) == []
    with pytest.raises(channel.MessageCorrupted, match="message of kind 9, 7 bytes"):
        frames_of(Message(9, memoryview(bytes(7)), True))


def test_kinds_beside_the_flag(ends: tuple[End, End]) -> None:
    here, there = ends
    for kind in (0, MAX_KIND):
        for size in (0, SMALL):
            here.channel.put(kind, [bytes(size)])
            assert received(there) == [(kind, [bytes(size)])]
    for kind in (-1, MAX_KIND + 1, channel.SEGMENT):
        for size in (0, SMALL):
            with pytest.raises(AssertionError):
                here.channel.put(kind, [bytes(size)])
    assert received(there) == []
