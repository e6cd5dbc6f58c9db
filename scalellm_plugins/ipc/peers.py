"""Two processes of one machine find each other, make sure of each other, and hand over descriptors.

The engine listens on one socket of the kernel's abstract namespace per frontend, whose name both
derive from the address that vLLM gave that frontend: there is no file, so none is left behind. A
frontend connects when it is ready, brings the shared memory, and either side knows the other's
process by pidfd from then on. A frontend that is not there, or not local, never connects, and
vLLM's sockets carry its messages.

Only processes of the same user get in: the kernel tells who connected (SO_PEERCRED).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
from array import array
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from scalellm_plugins.errors import ScaleLLMError

from . import memory, ring

VERSION = 2
"""Of everything that crosses: handshake, layout, messages. Both ends run the same package, but an
engine may outlive the upgrade of the files under it."""

TIMEOUT_S = 5.0
_MOST_BYTES = 4096


class PeerError(ScaleLLMError):
    """The other end is not what this end can talk to."""


class Hello(msgspec.Struct, array_like=True):
    """A frontend's first message. With it: shared memory to the engine, from it, and an eventfd."""

    version: int
    client_index: int
    to_engine: int  # capacity in bytes
    to_frontend: int


class Welcome(msgspec.Struct, array_like=True):
    """The engine's answer. With it: the eventfd that wakes the engine. `refused`: and why."""

    version: int
    engine_index: int
    refused: str | None = None


_Said = TypeVar("_Said", Hello, Welcome)


@dataclass
class Peer:
    """What a finished handshake leaves: this end's parts of a channel. Descriptors are owned."""

    index: int
    """The other end's: a frontend's client index, an engine's index."""
    pid: int
    pidfd: int
    socket: socket.socket
    """Carries large records' descriptors, and nothing else."""
    sending: int
    """Shared memory of the ring in which this end writes."""
    receiving: int
    sizes: tuple[int, int]
    """Capacities of the two, in bytes."""
    wake: int
    """Eventfd by which this end wakes the other."""

    def close(self) -> None:
        """Close every descriptor; nothing when that is done."""
        self.socket.close()
        for fd in (self.pidfd, self.sending, self.receiving, self.wake):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.sending = self.receiving = self.wake = -1


def name_of(address: str, engine_index: int) -> bytes:
    """Return the abstract socket's name for a frontend's output address and an engine."""
    digest = hashlib.sha256(f"{address}#{engine_index}".encode()).hexdigest()[:32]
    return b"\0scalellm-ipc-" + digest.encode()


def listen(address: str, engine_index: int) -> socket.socket:
    """Wait for the frontend with this output address; `accept` makes a peer of it.

    Raises:
        OSError: another engine has this name.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(name_of(address, engine_index))
        listener.listen(8)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def accept(listener: socket.socket, client_index: int, engine_index: int) -> Peer:
    """Take a frontend's connection; `welcome` completes it, once this end is ready for messages.

    Args:
        listener: readable.
        client_index: whose listener it is.
        engine_index: this engine's.

    Raises:
        PeerError: it is not a frontend that this engine can serve. One of this user was told why.
        OSError: it went away, or said nothing in time.
    """
    sock, _ = listener.accept()
    fds: list[int] = []
    try:
        sock.settimeout(TIMEOUT_S)
        pid = _check_user(sock)
        try:
            data, fds = _receive(sock, 3)
            hello = _decode(data, Hello)
            _check_hello(hello, fds, client_index)
        except PeerError as error:
            with contextlib.suppress(OSError):
                _send(sock, Welcome(VERSION, engine_index, str(error)), [])
            raise PeerError(f"frontend {client_index} (process {pid}): {error}") from None
        pidfd = os.pidfd_open(pid)
    except BaseException:
        _close(fds)
        sock.close()
        raise
    receiving, sending, eventfd = fds
    sizes = (hello.to_frontend, hello.to_engine)
    return Peer(client_index, pid, pidfd, sock, sending, receiving, sizes, eventfd)


def welcome(peer: Peer, engine_index: int, wake: int) -> None:
    """Tell an accepted frontend that its messages are read from now on; `wake` wakes this end.

    Raises:
        OSError: it went away.
    """
    _send(peer.socket, Welcome(VERSION, engine_index), [wake])
    peer.socket.setblocking(False)


def connect(
    address: str, client_index: int, engine_index: int, wake: int, sizes: tuple[int, int]
) -> Peer | None:
    """Connect to an engine; None where none listens (it is remote, or has the feature off).

    Args:
        address: this frontend's output address.
        client_index: this frontend's index.
        engine_index: the engine's.
        wake: this frontend's eventfd, for the engine.
        sizes: capacities of the rings to and from the engine, in bytes.

    Raises:
        PeerError: the engine refuses, or is not what it should be.
        OSError: it went away, or did not answer in time.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds: list[int] = []
    try:
        sock.settimeout(TIMEOUT_S)
        try:
            sock.connect(name_of(address, engine_index))
        except ConnectionRefusedError:
            sock.close()
            return None
        pid = _check_user(sock)
        # Before its answer, which shows that it lived until then: no later process has its number.
        fds.append(os.pidfd_open(pid))
        for size in sizes:
            fds.append(memory.create(ring.size_of(size)))
        _send(sock, Hello(VERSION, client_index, *sizes), [*fds[1:], wake])
        try:
            data, taken = _receive(sock, 1)
            fds += taken
            _check_welcome(_decode(data, Welcome), len(taken), engine_index)
        except PeerError as error:
            raise PeerError(f"engine {engine_index} (process {pid}): {error}") from None
    except BaseException:
        _close(fds)
        sock.close()
        raise
    sock.setblocking(False)
    pidfd, sending, receiving, eventfd = fds
    return Peer(engine_index, pid, pidfd, sock, sending, receiving, sizes, eventfd)


def _check_hello(hello: Hello, fds: list[int], client_index: int) -> None:
    if hello.version != VERSION:
        raise PeerError(f"speaks version {hello.version}, this engine {VERSION}")
    if hello.client_index != client_index:
        raise PeerError(f"says that it is frontend {hello.client_index}")
    if len(fds) != 3:
        raise PeerError(f"sent {len(fds)} descriptors, not 3")
    for fd, size in zip(fds, (hello.to_engine, hello.to_frontend), strict=False):
        try:
            memory.attach(fd, ring.size_of(size)).close()
        except (ScaleLLMError, ValueError, OSError) as error:
            raise PeerError(str(error)) from None


def _check_welcome(answer: Welcome, descriptors: int, engine_index: int) -> None:
    if answer.refused is not None:
        raise PeerError(f"refused: {answer.refused}")
    if answer.version != VERSION:
        raise PeerError(f"speaks version {answer.version}, this frontend {VERSION}")
    if answer.engine_index != engine_index:
        raise PeerError(f"says that it is engine {answer.engine_index}")
    if descriptors != 1:
        raise PeerError(f"sent {descriptors} descriptors, not 1")


def _check_user(sock: socket.socket) -> int:
    """Return the peer's process, if it belongs to this user and can be watched."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int
    pid, uid, _ = struct.unpack("3i", raw)
    if uid != os.geteuid():
        raise PeerError(f"process {pid} of user {uid} connected; this one is user {os.geteuid()}'s")
    if pid <= 0:
        raise PeerError("a process of another PID namespace connected: its end could not be seen")
    return pid


def _send(sock: socket.socket, message: msgspec.Struct, fds: list[int]) -> None:
    socket.send_fds(sock, [msgspec.msgpack.encode(message)], fds)


def receive(sock: socket.socket, size: int, most: int) -> tuple[bytes, list[int], int]:
    """Receive up to `size` bytes and `most` descriptors, and flags that say if there was more.

    Unlike `socket.recv_fds`, which takes flags and ignores them, it keeps the descriptors from
    programs that this process starts.
    """
    fds = array("i")
    data, ancillary, flags, _ = sock.recvmsg(
        size, socket.CMSG_LEN(most * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content)
    return data, list(fds), flags


def _receive(sock: socket.socket, most: int) -> tuple[bytes, list[int]]:
    data, fds, flags = receive(sock, _MOST_BYTES, most)
    if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        _close(fds)
        raise PeerError("the other end hung up" if not data else "the other end sent too much")
    return data, fds


def _decode(data: bytes, kind: type[_Said]) -> _Said:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise PeerError(f"not a {kind.__name__}: {error}") from None


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
