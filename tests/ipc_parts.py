"""Rings and channels whose both ends are here, and what they leave behind."""

from __future__ import annotations

import atexit
import contextlib
import gc
import mmap
import os
import select
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from scalellm_plugins.ipc import memory, peers, ring
from scalellm_plugins.ipc.channel import Channel, frames_of
from scalellm_plugins.ipc.peers import VERSION, Hello

FULL = os.environ.get("SCALELLM_STRESS") == "full"
"""Whether proofs run at their full size; `make stress` sets it for those of two processes."""

SMALL = 4096
"""The smallest ring, in bytes: it is full, and at its end, all the time."""

CLIENT, ENGINE = 3, 5


@dataclass
class End:
    """One end of a connection, and the eventfd by which the other wakes it."""

    channel: Channel
    eventfd: int

    def woken(self) -> bool:
        """Whether it was woken since the last look."""
        try:
            return os.eventfd_read(self.eventfd) > 0
        except BlockingIOError:
            return False


def mappings(capacity: int) -> tuple[mmap.mmap, mmap.mmap]:
    """Map one ring's memory twice, as two processes do."""
    fd = memory.create(ring.size_of(capacity))
    try:
        return memory.attach(fd, ring.size_of(capacity)), memory.attach(fd, ring.size_of(capacity))
    finally:
        os.close(fd)


@contextlib.contextmanager
def connected(capacity: int = SMALL, beside: int = 0) -> Iterator[tuple[End, End]]:
    """Two ends of a connection, without the handshake."""
    sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memories = [memory.create(ring.size_of(capacity)) for _ in range(2)]
    eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
    ends = []
    for here, sock in enumerate(sockets):
        sock.setblocking(False)
        peer = peers.Peer(
            0,
            os.getpid(),
            os.pidfd_open(os.getpid()),
            sock,
            memories[here] if here == 0 else os.dup(memories[1]),
            memories[1] if here == 0 else os.dup(memories[0]),
            (capacity, capacity),
            os.dup(eventfds[1 - here]),
        )
        ends.append(End(Channel(peer, beside), eventfds[here]))
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.channel.close()
            os.close(end.eventfd)


def received(end: End, most: int = 10**6) -> list[tuple[int, list[bytes]]]:
    """Take so many messages, by default all that are there."""
    found = []
    while len(found) < most and (message := end.channel.receive()) is not None:
        found.append((message.kind, [bytes(frame) for frame in frames_of(message)]))
        end.channel.release()
    return found


def open_descriptors() -> list[str]:
    """What this process has open, sorted; sockets and pipes without their numbers."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
            found.append(os.readlink(path).split(":[")[0])
    return sorted(found)


def shared_memory() -> list[str]:
    """Mappings of our shared memory in this process, and files of ours, which there never are."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = sorted(os.listdir("/dev/shm"))
    return [line for line in (*lines, *files) if "scalellm" in line and ".so" not in line]


@contextlib.contextmanager
def leaving_nothing() -> Iterator[None]:
    """Nothing more is open or mapped after the block than before it.

    What is garbage already is collected before, so that it does not count, and what is not is set
    aside: going through the objects of vLLM and torch takes a quarter of a second each time.
    """
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()
        atexit.register(gc.unfreeze)
    before, mapped = Counter(open_descriptors()), Counter(shared_memory())
    yield
    gc.collect()
    assert not Counter(open_descriptors()) - before
    assert not Counter(shared_memory()) - mapped


# Handshakes, step by step


@contextlib.contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    listener = peers.listen(address, ENGINE)
    try:
        yield listener
    finally:
        listener.close()


def accept(listener: socket.socket, client_index: int = CLIENT) -> peers.Peer:
    select.select([listener], [], [], 30)
    return peers.accept(listener, client_index, ENGINE)


def ring_memory(size: int = SMALL) -> int:
    return memory.create(ring.size_of(size))


def hello(**changes: Any) -> bytes:
    said = Hello(VERSION, CLIENT, SMALL, SMALL)
    return msgspec.msgpack.encode(msgspec.structs.replace(said, **changes))


def event() -> int:
    return os.eventfd(0)


GOOD = [ring_memory, ring_memory, event]


@contextlib.contextmanager
def stranger(address: str) -> Iterator[socket.socket]:
    """Something that connects to an engine."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(peers.name_of(address, ENGINE))
        yield sock


def send(sock: socket.socket, data: bytes, make: list[Callable[[], int]]) -> None:
    fds = [function() for function in make]
    socket.send_fds(sock, [data], fds)
    for fd in fds:
        os.close(fd)
