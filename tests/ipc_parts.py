"""Rings and channels whose both ends are here, and what they leave behind."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scalellm_plugins.ipc import memory, peers, ring
from scalellm_plugins.ipc.channel import Channel

FULL = os.environ.get("SCALELLM_STRESS") == "full"
"""Whether proofs run at their full size (`make stress`)."""

SMALL = 4096
"""The smallest ring, in bytes: it is full, and at its end, all the time."""


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
def connected(capacity: int = SMALL) -> Iterator[tuple[End, End]]:
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
        ends.append(End(Channel(peer), eventfds[here]))
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.channel.close()
            os.close(end.eventfd)


def open_descriptors() -> list[str]:
    """What this process has open, sorted; sockets and pipes without their numbers."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
            found.append(os.readlink(path).split(":[")[0])
    return sorted(found)


def shared_memory() -> list[str]:
    """Mappings of our shared memory in this process, and files in /dev/shm."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ours = [line for line in lines if "memfd:scalellm" in line]
    return ours + sorted(os.listdir("/dev/shm"))
