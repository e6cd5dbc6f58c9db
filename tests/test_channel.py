"""Messages of any size arrive whole and in order; nobody sleeps who has work; nothing leaks."""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scalellm_plugins.ipc import channel, memory, peers, ring
from scalellm_plugins.ipc.channel import MAX_KIND, MOST_SEGMENTS, Channel, frames_of

from .ipc_parts import (
    SMALL,
    End,
    connected,
    leaving_nothing,
    open_descriptors,
    received,
    shared_memory,
)

LARGE = SMALL // 8
"""Messages of more bytes are segments."""


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    with connected() as both:
        yield both


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    with leaving_nothing():
        yield


def filler(size: int, seed: int) -> bytes:
    return (bytes([seed & 255, seed >> 8 & 255, 7]) * (size // 3 + 1))[:size]


SIZE = st.one_of(st.integers(0, 70), st.integers(LARGE - 80, LARGE + 80), st.integers(0, 3 * SMALL))
SEND = st.tuples(st.integers(0, MAX_KIND), st.lists(SIZE, max_size=4))
STEP = st.one_of(SEND, SEND, st.integers(1, 4), st.none())


BESIDE = st.sampled_from([0, 2 * SMALL, 2 * SMALL])


@given(st.lists(STEP, max_size=40), BESIDE)
@example([(1, [size]) for size in range(LARGE - 24, LARGE + 8)], 0)
@example([(1, [SMALL])] * (MOST_SEGMENTS + 3), 0)
@example([(1, [400])] * 30, 0)
@example([*[(1, [400])] * 12, 4, (1, [8]), 4, None, (1, [400])], 0)
@example(
    [(1, [SMALL]), (1, [SMALL]), 1, (1, [3 * SMALL]), (1, [SMALL]), 9, (1, [SMALL])], 2 * SMALL
)
def test_what_is_put_arrives(steps: list[Any], beside: int) -> None:
    """Numbers receive so many. At None the sender tries again, if it was woken."""
    with connected(beside=beside) as (here, there):
        sent, found = [], []
        for number, step in enumerate(steps):
            if step is None:
                if here.woken():
                    here.channel.flush()
            elif isinstance(step, int):
                found += received(there, step)
            else:
                kind, sizes = step
                frames = [filler(size, number + at) for at, size in enumerate(sizes)]
                sent.append((kind, frames))
                here.channel.put(kind, frames)
        while len(found) < len(sent):
            more = received(there)
            assert more or here.channel.backlog
            found += more
            if here.channel.backlog:
                assert here.woken(), "asleep, with messages to send"
                here.channel.flush()
        assert found == sent, "lost, torn or out of order"
        assert here.channel.flush()
        assert there.channel.receive() is None


@pytest.mark.parametrize(
    "kind", [bytes, bytearray, memoryview, lambda data: array.array("i", data)]
)
@pytest.mark.parametrize("size", [0, 4, 64, 400, 8 * SMALL])
def test_frames_of_any_type(ends: tuple[End, End], kind: Callable[[bytes], Any], size: int) -> None:
    here, there = ends
    content = filler(size, 1)
    here.channel.put(5, [kind(content), b"", kind(content)])
    assert received(there) == [(5, [content, b"", content])]


def test_where_segments_begin(ends: tuple[End, End]) -> None:
    here, there = ends
    for size, borrowed in ((LARGE - 16, True), (LARGE - 15, False)):
        here.channel.put(1, [bytes(size)])
        message = there.channel.receive()
        assert message is not None
        assert message.borrowed is borrowed
        assert len(frames_of(message)[0]) == size


def test_memory_beside_the_ring_is_used_again() -> None:
    with connected(beside=2 * SMALL) as (here, there):
        mapped = set()
        for number in range(5):
            here.channel.put(1, [filler(SMALL + number, number)])
            message = there.channel.receive()
            assert message is not None
            assert message.borrowed
            assert bytes(frames_of(message)[0]) == filler(SMALL + number, number)
            mapped.add(id(message.data.obj))
            del message
            there.channel.release()
        assert len(mapped) == 1
        assert len(shared_memory()) == 6, "two rings and one memory beside them, mapped twice each"


def test_a_message_beside_the_ring_is_not_written_over() -> None:
    """It is the reader's until it is released; the next one has a segment meanwhile."""
    with connected(beside=2 * SMALL) as (here, there):
        here.channel.put(1, [b"x" * SMALL])
        here.channel.put(2, [b"y" * SMALL])
        first, second = there.channel.receive(), there.channel.receive()
        assert first is not None
        assert second is not None
        assert (first.borrowed, second.borrowed) == (True, False)
        assert bytes(frames_of(first)[0]) == b"x" * SMALL
        assert bytes(frames_of(second)[0]) == b"y" * SMALL
        del first, second
        there.channel.release()


def test_memory_beside_the_ring_that_nobody_heard_of_is_made_anew() -> None:
    """Its descriptor has passed and no record: the reader skips it for the next segment's."""
    with connected(beside=2 * SMALL) as (here, there):
        with contextlib.suppress(TypeError):  # a frame that is no frame
            here.channel.send(1, [memoryview(bytes(2 * SMALL))[::2]])
        assert here.channel._passed == 1
        for size in (3 * SMALL, SMALL):
            here.channel.put(1, [filler(size, 1)])
            assert received(there) == [(1, [filler(size, 1)])]


def test_frames_of_a_segment_are_aligned(ends: tuple[End, End]) -> None:
    here, there = ends
    here.channel.put(1, [b"x", b"y" * 1000, b"z" * 65, b"w"])
    message = there.channel.receive()
    assert message is not None
    whole = memoryview(message.data.obj)
    places = [bytes(whole).index(bytes(frame)) for frame in frames_of(message)[1:]]
    assert [place % 64 for place in places] == [0, 0, 0]


def test_a_segment_lives_as_long_as_it_is_held(ends: tuple[End, End]) -> None:
    here, there = ends
    before = shared_memory()
    here.channel.put(1, [b"x" * SMALL])
    message = there.channel.receive()
    assert message is not None
    there.channel.release()
    frames = frames_of(message)
    del message
    here.channel.close()
    there.channel.close()
    assert frames == [b"x" * SMALL]
    del frames
    assert len(shared_memory()) == len(before) - 4  # two rings, mapped twice


def test_programs_that_are_started_get_no_segment(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = ends
    attach = memory.attach

    def attach_own(fd: int, size: int) -> mmap.mmap:
        assert not os.get_inheritable(fd)
        return attach(fd, size)

    here.channel.put(1, [bytes(SMALL)])
    monkeypatch.setattr(memory, "attach", attach_own)
    assert len(received(there)) == 1


def test_the_kernel_takes_a_segment_in_portions(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does beyond 2 GiB."""
    here, there = ends
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, place: write(fd, data[:1000], place))
    frames = [filler(5000, 1), b"", array.array("i", range(999))]
    here.channel.put(1, frames)
    assert received(there) == [(1, [bytes(frame) for frame in frames])]


def test_segments_under_way_are_bounded() -> None:
    """Their descriptors count against a limit that all of the user's processes share."""
    with connected(1 << 16) as (here, there):
        before = len(open_descriptors())
        for number in range(MOST_SEGMENTS + 10):
            here.channel.put(number, [bytes(1 << 14)])
        assert len(open_descriptors()) == before
        assert here.channel.backlog == 10
        assert not here.woken()
        for left in range(9, -1, -1):
            assert len(received(there, 1)) == 1
            assert here.woken()
            assert here.channel.flush() == (left == 0)
            assert here.channel.backlog == left
        assert [kind for kind, _ in received(there)] == list(range(10, MOST_SEGMENTS + 10))


def test_a_full_socket(ends: tuple[End, End]) -> None:
    here, there = ends
    here.channel.peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    for number in range(30):
        here.channel.put(number, [bytes(SMALL)])
    assert 0 < here.channel.backlog < 30
    found = []
    while here.channel.backlog:
        found += received(there, 1)
        assert here.woken()
        here.channel.flush()
    found += received(there)
    assert [kind for kind, _ in found] == list(range(30))


def test_a_full_socket_that_is_emptied_meanwhile(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the refusal and the wish to be woken: nobody would do that any more."""
    here, there = ends
    found: list[Any] = []
    send = socket.send_fds

    def full_once(*args: Any) -> int:
        monkeypatch.setattr(socket, "send_fds", send)
        found.extend(received(there))
        raise BlockingIOError

    here.channel.put(1, [bytes(SMALL)])
    monkeypatch.setattr(socket, "send_fds", full_once)
    here.channel.put(2, [bytes(SMALL)])
    assert here.channel.backlog == 0 or here.woken()
    here.channel.flush()
    assert [kind for kind, _ in found + received(there)] == [1, 2]


def test_segments_that_are_taken_meanwhile(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same race, with the bound on segments."""
    here, there = ends
    monkeypatch.setattr(channel, "MOST_SEGMENTS", 1)
    here.channel.put(1, [bytes(SMALL)])
    found: list[Any] = []
    ask = here.channel.producer.ask_for_room

    def too_late() -> None:
        found.extend(received(there))
        ask()

    monkeypatch.setattr(here.channel.producer, "ask_for_room", too_late)
    here.channel.put(2, [bytes(SMALL)])
    assert here.channel.backlog == 0 or here.woken()
    here.channel.flush()
    assert [kind for kind, _ in found + received(there)] == [1, 2]


def test_a_sender_that_was_interrupted(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor is under way, its record is not: the next is not taken for it."""
    here, there = ends

    def interrupted(kind: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(here.channel.producer, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            here.channel.put(1, [b"1" * SMALL])
    here.channel.put(2, [b"2" * SMALL])
    here.channel.put(3, [b"3" * SMALL])
    assert received(there) == [(2, [b"2" * SMALL]), (3, [b"3" * SMALL])]


# Peers that go


def test_the_last_words_of_a_peer_that_left_ours_unread(ends: tuple[End, End]) -> None:
    """The kernel reports the reset before it gives out what the peer has sent."""
    here, there = ends
    here.channel.put(1, [b"unread" * SMALL])
    there.channel.put(2, [b"last" * SMALL])
    there.channel.put(3, [b"words"])
    there.channel.put(4, [b"large" * SMALL])
    there.channel.close()
    assert received(here) == [
        (2, [b"last" * SMALL]),
        (3, [b"words"]),
        (4, [b"large" * SMALL]),
    ]


@pytest.mark.parametrize("unread", [False, True])
def test_sending_to_nobody(ends: tuple[End, End], unread: bool) -> None:
    here, there = ends
    if unread:
        here.channel.put(1, [bytes(SMALL)])
    there.channel.close()
    for _ in range(MOST_SEGMENTS + 3):
        here.channel.put(1, [bytes(SMALL)])
    assert here.channel.backlog == 0


def test_closing_twice(ends: tuple[End, End]) -> None:
    here, _ = ends
    here.channel.close()
    stranger = os.open("/dev/null", os.O_RDONLY)  # gets a number that was the channel's
    here.channel.close()
    os.fstat(stranger)
    os.close(stranger)


def test_what_cannot_be_made_is_closed() -> None:
    before = open_descriptors()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds = [memory.create(ring.size_of(SMALL)) for _ in range(2)]
    pidfd, eventfd = os.pidfd_open(os.getpid()), os.eventfd(0)
    peer = peers.Peer(0, 1, pidfd, ours, *fds, (SMALL, 2 * SMALL), eventfd)
    with pytest.raises(memory.SegmentError):
        Channel(peer)
    theirs.close()
    assert open_descriptors() == before
