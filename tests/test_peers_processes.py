"""The handshake between processes: one is killed, ends, or belongs to somebody else."""

from __future__ import annotations

import os
import select
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from scalellm_plugins.ipc import peers
from scalellm_plugins.ipc.peers import PeerError

from .ipc_parts import (
    CLIENT,
    ENGINE,
    GOOD,
    SMALL,
    accept,
    hello,
    leaving_nothing,
    listening,
    send,
    stranger,
)

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user, too")


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    with leaving_nothing():
        yield


@pytest.fixture
def address() -> str:
    return f"ipc:///tmp/{uuid.uuid4()}"


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@contextmanager
def child(function: Callable[[], Any]) -> Iterator[int]:
    """Run it in another process, which ends with it."""
    pid = os.fork()
    if not pid:
        with suppress(BaseException):
            function()
        os._exit(0)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError, ChildProcessError):  # waited for already
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def connect(address: str, eventfd: int) -> peers.Peer | None:
    return peers.connect(address, CLIENT, ENGINE, eventfd, (SMALL, SMALL))


def ends_soon(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 30)[0])


def test_a_frontend_that_is_killed_before_it_speaks(address: str) -> None:
    def frontend() -> None:
        with stranger(address):
            signal.pause()

    with listening(address) as listener, child(frontend) as pid:
        select.select([listener], [], [], 30)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PeerError, match=f"process {pid}.*hung up"):
            accept(listener)


def test_a_frontend_that_is_killed_before_the_welcome(address: str, eventfd: int) -> None:
    def frontend() -> None:
        with stranger(address) as sock:
            send(sock, hello(), GOOD)
            signal.pause()

    with listening(address) as listener, child(frontend) as pid:
        peer = accept(listener)
        assert peer.pid == pid
        os.kill(pid, signal.SIGKILL)
        assert ends_soon(peer.pidfd)
        with pytest.raises(BrokenPipeError):
            peers.welcome(peer, ENGINE, eventfd)
        peer.close()


def connect_when_it_listens(address: str, eventfd: int) -> peers.Peer | None:
    peer = None
    end = time.monotonic() + 30
    while peer is None and time.monotonic() < end:
        peer = connect(address, eventfd)
    return peer


def test_an_engine_that_ends_instead_of_answering(address: str, eventfd: int) -> None:
    with (
        child(lambda: accept(peers.listen(address, ENGINE))),
        pytest.raises((PeerError, ConnectionResetError)),
    ):
        connect_when_it_listens(address, eventfd)


def test_an_engine_that_is_gone_when_its_answer_is_read(
    address: str, eventfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may be another process's by then; it is the engine's end that is seen."""
    receive = peers._receive

    def engine() -> None:
        peers.welcome(accept(peers.listen(address, ENGINE)), ENGINE, eventfd)

    with child(engine) as pid:

        def receive_late(*args: Any) -> Any:
            received = receive(*args)
            os.waitpid(pid, 0)
            return received

        monkeypatch.setattr(peers, "_receive", receive_late)
        peer = connect_when_it_listens(address, eventfd)
        assert peer is not None
        assert peer.pid == pid
        assert ends_soon(peer.pidfd)
        peer.close()


@only_root
def test_a_frontend_of_another_user(address: str) -> None:
    def other() -> None:
        os.seteuid(65534)
        with stranger(address) as sock:
            send(sock, hello(), GOOD)
            signal.pause()

    with (
        listening(address) as listener,
        child(other) as pid,
        pytest.raises(PeerError, match=f"process {pid} of user 65534 connected"),
    ):
        accept(listener)


@only_root
def test_an_engine_of_another_user(address: str, eventfd: int) -> None:
    """Anybody can take a name: nothing is handed over before it is clear whose it is."""
    told, telling = os.pipe()

    def other() -> None:
        os.seteuid(65534)
        with listening(address) as listener:
            os.write(telling, b"listening")
            select.select([listener], [], [], 30)
            with listener.accept()[0] as sock:
                os.write(telling, sock.recv(4096) or b"hung up")

    with child(other):
        assert os.read(told, 100) == b"listening"
        with pytest.raises(PeerError, match="of user 65534"):
            connect(address, eventfd)
        assert os.read(told, 100) == b"hung up"
    os.close(told)
    os.close(telling)
