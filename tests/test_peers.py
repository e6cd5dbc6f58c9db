"""The handshake: who gets in, who is told why not, and what is left when somebody goes half-way."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import pytest

from scalellm_plugins.ipc import memory, peers, ring
from scalellm_plugins.ipc.channel import Channel, frames_of
from scalellm_plugins.ipc.peers import VERSION, Hello, PeerError, Welcome

from .ipc_parts import (
    CLIENT,
    ENGINE,
    GOOD,
    SMALL,
    accept,
    event,
    hello,
    leaving_nothing,
    listening,
    ring_memory,
    send,
    stranger,
)

SIZES = (SMALL, 2 * SMALL)


@pytest.fixture
def address() -> str:
    return f"ipc:///tmp/{uuid.uuid4()}"


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    with leaving_nothing():
        yield


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "TIMEOUT_S", 30.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "TIMEOUT_S", 0.05)


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@contextmanager
def beside(function: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run it in a thread; its result, or its exception, is in the list after the block."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(function())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield result
    finally:
        thread.join()


def test_both_ends(address: str, eventfd: int) -> None:
    mine = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    with (
        listening(address) as listener,
        beside(lambda: peers.connect(address, CLIENT, ENGINE, eventfd, SIZES)) as connected,
    ):
        engine = accept(listener)
        there = Channel(engine)
        there.put(1, [b"before the welcome"])
        peers.welcome(engine, ENGINE, mine)
    (frontend,) = connected
    here = Channel(frontend)
    assert (engine.index, engine.pid, frontend.index, frontend.pid) == (
        CLIENT,
        os.getpid(),
        ENGINE,
        os.getpid(),
    )
    assert (here.producer.capacity, here.consumer.capacity) == SIZES
    assert (there.consumer.capacity, there.producer.capacity) == SIZES
    for one, other, woken in ((here, there, mine), (there, here, eventfd)):
        message = other.receive()
        if other is here:
            assert message is not None
            assert frames_of(message) == [b"before the welcome"]
        assert other.receive() is None
        assert other.consumer.park()
        one.put(1, [b"text", b"x" * 3 * SMALL])
        assert os.eventfd_read(woken) == 1
        message = other.receive()
        assert message is not None
        assert frames_of(message) == [b"text", b"x" * 3 * SMALL]
    del message
    for peer in (frontend, engine):
        fds = (peer.pidfd, peer.sending, peer.receiving, peer.wake, peer.socket.fileno())
        assert not any(os.get_inheritable(fd) for fd in fds)
        assert not peer.socket.getblocking()
    assert not select.select([frontend.pidfd, engine.pidfd], [], [], 0)[0]
    here.close()
    there.close()
    os.close(mine)


def test_nobody_listens(address: str, eventfd: int) -> None:
    assert peers.connect(address, CLIENT, ENGINE, eventfd, SIZES) is None
    with listening(address):
        assert peers.connect(address, CLIENT, ENGINE + 1, eventfd, SIZES) is None
        assert peers.connect(address + "0", CLIENT, ENGINE, eventfd, SIZES) is None
    assert peers.connect(address, CLIENT, ENGINE, eventfd, SIZES) is None


def test_one_engine_per_name(address: str) -> None:
    with listening(address), pytest.raises(OSError, match="in use"):
        peers.listen(address, ENGINE)


def test_a_ring_of_no_size(address: str, eventfd: int) -> None:
    with listening(address), pytest.raises(ValueError, match="power of two"):
        peers.connect(address, CLIENT, ENGINE, eventfd, (SMALL, 5000))


# What a frontend may say


def unsealed() -> int:
    fd = os.memfd_create("scalellm-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, ring.size_of(SMALL))
    return fd


WRONG_HELLOS = {
    "nothing": (b"", [], "hung up"),
    "garbage": (b"\xc1garbage", [], "not a Hello"),
    "another protocol": (b"GET / HTTP/1.1\r\n\r\n", GOOD, "not a Hello"),
    "types": (msgspec.msgpack.encode([VERSION, "3", SMALL, SMALL]), GOOD, "not a Hello"),
    "too little": (msgspec.msgpack.encode([VERSION, CLIENT]), GOOD, "not a Hello"),
    "too much": (b"\0" * 5000, GOOD, "too much"),
    "version": (
        hello(version=VERSION + 1),
        GOOD,
        f"speaks version {VERSION + 1}, this engine {VERSION}",
    ),
    "index": (hello(client_index=4), GOOD, "says that it is frontend 4"),
    "no descriptors": (hello(), [], "sent 0 descriptors"),
    "too few": (hello(), GOOD[1:], "sent 2 descriptors"),
    "too many": (hello(), [*GOOD, event], "too much"),
    "unsealed": (hello(), [ring_memory, unsealed, event], "cannot shrink"),
    "short": (hello(), [lambda: memory.create(4096), ring_memory, event], "of 4096 bytes"),
    "of another size": (hello(to_frontend=8192), GOOD, "expected 12288 bytes"),
    "no memory": (hello(), [event, ring_memory, event], "not a memfd"),
    "no power of two": (hello(to_engine=5000), GOOD, "power of two"),
    "negative": (hello(to_engine=-4096), GOOD, "power of two"),
    "huge": (hello(to_engine=2**63), GOOD, "power of two"),
}


@pytest.mark.parametrize("what", WRONG_HELLOS)
def test_a_frontend_that_is_none(address: str, what: str) -> None:
    """It is refused, and told why."""
    data, make, why = WRONG_HELLOS[what]
    with listening(address) as listener, stranger(address) as sock:
        if data:
            send(sock, data, make)
        else:
            sock.shutdown(socket.SHUT_WR)
        with pytest.raises(PeerError, match=f"^frontend {CLIENT} .process {os.getpid()}.*{why}"):
            accept(listener)
        answer = msgspec.msgpack.decode(sock.recv(4096), type=Welcome)
        assert (answer.version, answer.engine_index) == (VERSION, ENGINE)
        assert why in (answer.refused or "")
        assert sock.recv(1) == b""


@pytest.mark.parametrize("what", ["nothing", "garbage", "short"])
def test_a_frontend_that_does_not_wait_for_the_answer(address: str, what: str) -> None:
    data, make, why = WRONG_HELLOS[what]
    with listening(address) as listener:
        with stranger(address) as sock:
            if data:
                send(sock, data, make)
        with pytest.raises(PeerError, match=why):
            accept(listener)


def test_a_frontend_that_went_before_it_was_accepted(address: str) -> None:
    with listening(address) as listener:
        with stranger(address):
            pass
        with pytest.raises(PeerError, match="hung up"):
            accept(listener)
        with pytest.raises(BlockingIOError):
            peers.accept(listener, CLIENT, ENGINE)


@pytest.mark.usefixtures("impatient")
def test_a_frontend_that_says_nothing(address: str) -> None:
    with listening(address) as listener, stranger(address), pytest.raises(TimeoutError):
        accept(listener)


def test_a_frontend_that_goes_before_the_welcome(address: str, eventfd: int) -> None:
    with listening(address) as listener:
        with stranger(address) as sock:
            send(sock, hello(), GOOD)
            peer = accept(listener)
        with pytest.raises(BrokenPipeError):
            peers.welcome(peer, ENGINE, eventfd)
        peer.close()
        peer.close()


def test_the_engine_serves_the_next(address: str, eventfd: int) -> None:
    """After one that was refused, and one that went."""
    with listening(address) as listener:
        for data in (b"garbage", hello()):
            with stranger(address) as sock:
                send(sock, data, GOOD)
                with suppress(PeerError):
                    accept(listener).close()
        with stranger(address) as sock:
            send(sock, hello(), GOOD)
            peer = accept(listener)
            peers.welcome(peer, ENGINE, eventfd)
            _, fds, _, _ = socket.recv_fds(sock, 4096, 1)
            os.close(*fds)
            peer.close()


# What an engine may say


def answer(**changes: Any) -> bytes:
    said = Welcome(VERSION, ENGINE)
    return msgspec.msgpack.encode(msgspec.structs.replace(said, **changes))


WRONG_WELCOMES = {
    "nothing": (b"", [], "hung up"),
    "garbage": (b"\xc1garbage", [event], "not a Welcome"),
    "too much": (b"\0" * 5000, [event], "too much"),
    "refused": (answer(refused="no room"), [], "refused: no room"),
    "refused without a reason": (answer(refused=""), [event], "refused: "),
    "version": (answer(version=9), [event], f"speaks version 9, this frontend {VERSION}"),
    "index": (answer(engine_index=6), [event], "says that it is engine 6"),
    "no descriptor": (answer(), [], "sent 0 descriptors"),
    "too many": (answer(), [event, event], "too much"),
}


@pytest.mark.parametrize("what", WRONG_WELCOMES)
def test_an_engine_that_is_none(address: str, eventfd: int, what: str) -> None:
    data, make, why = WRONG_WELCOMES[what]
    with (
        listening(address) as listener,
        beside(lambda: peers.connect(address, CLIENT, ENGINE, eventfd, SIZES)) as result,
    ):
        select.select([listener], [], [], 30)
        with listener.accept()[0] as sock:
            said, fds, _, _ = socket.recv_fds(sock, 4096, 3)
            for fd in fds:
                os.close(fd)
            assert msgspec.msgpack.decode(said, type=Hello) == Hello(VERSION, CLIENT, *SIZES)
            if data:
                send(sock, data, make)
            else:
                sock.shutdown(socket.SHUT_WR)
    assert isinstance(result[0], PeerError)
    assert why in str(result[0])
    assert f"engine {ENGINE} " in str(result[0])


def test_an_engine_that_goes_at_once(address: str, eventfd: int) -> None:
    """With our message unread, which the kernel tells in another way."""
    with (
        listening(address) as listener,
        beside(lambda: peers.connect(address, CLIENT, ENGINE, eventfd, SIZES)) as result,
    ):
        select.select([listener], [], [], 30)
        with listener.accept()[0] as sock:
            assert sock.recv(1, socket.MSG_PEEK)
    assert isinstance(result[0], PeerError | ConnectionResetError)


@pytest.mark.usefixtures("impatient")
def test_an_engine_that_says_nothing(address: str, eventfd: int) -> None:
    with listening(address), pytest.raises(TimeoutError):
        peers.connect(address, CLIENT, ENGINE, eventfd, SIZES)


def test_whoever_is_not_this_user(
    address: str, eventfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with listening(address) as listener, stranger(address) as sock:
        send(sock, hello(), GOOD)
        with pytest.raises(PeerError, match=f"of user {uid} connected; this one is user {uid + 1}"):
            accept(listener)
        with pytest.raises(PeerError, match=f"of user {uid} connected"):
            peers.connect(address, CLIENT, ENGINE, eventfd, SIZES)


def test_a_process_that_cannot_be_seen(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another PID namespace: it has number 0 here."""

    class Elsewhere:
        def getsockopt(self, *_: int) -> bytes:
            return struct.pack("3i", 0, os.geteuid(), 0)

    elsewhere: Any = Elsewhere()
    with pytest.raises(PeerError, match="PID namespace"):
        peers._check_user(elsewhere)
