"""The differential suite's client against servers that break HTTP: it must name what they do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from .differential_client import Client, Exchange

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
GOOD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

Script = list[bytes]
"""What a server sends on one connection: one entry per request; then it closes."""


@pytest.fixture
def client() -> Iterator[Callable[..., Client]]:
    """A client of a server that answers connections by these scripts, in their order."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def serve(scripts: tuple[Script, ...]) -> None:
        for script in scripts:
            connection, _ = listener.accept()
            with connection:
                for answer in script:
                    connection.recv(1 << 16)
                    connection.sendall(answer)

    def make(*scripts: Script) -> Client:
        threads.append(threading.Thread(target=serve, args=(scripts,), daemon=True))
        threads[-1].start()
        return Client(listener.getsockname()[1])

    yield make
    listener.close()


def _bodies(*exchanges: Exchange) -> list[bytes]:
    return [response.body for exchange in exchanges for response in exchange.responses]


def test_an_idle_connection_that_was_closed_is_renewed(client: Callable[..., Client]) -> None:
    with client([GOOD], [GOOD]) as one:
        assert _bodies(one.request(REQUEST, "GET"), one.request(REQUEST, "GET")) == [b"ok", b"ok"]


def test_a_response_cut_short_is_not_asked_for_again(client: Callable[..., Client]) -> None:
    """Else a server that dies in the middle of its answers would look sound."""
    with client([GOOD, GOOD[:-1]], [GOOD]) as one:
        one.request(REQUEST, "GET")
        exchange = one.request(REQUEST, "GET")
        assert exchange.responses == ()
        assert "1 of 2 bytes" in exchange.connection


def test_bytes_after_a_response_are_named_and_answer_nobody(
    client: Callable[..., Client],
) -> None:
    with client([GOOD + GOOD, GOOD], [GOOD]) as one:
        one.request(REQUEST, "GET")
        exchange = one.request(REQUEST, "GET")
        assert _bodies(exchange) == [b"ok"]
        assert "HTTP/1.1 200 OK" in exchange.connection


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"data: [DONE]\r\n\r\n", "[DONE]"),
        (b"HTTP/1.1 two OK\r\n\r\n", "'two'"),
        (CHUNKED + b"x\r\n", "'x'"),
        (CHUNKED + b"2\r\nokay\r\n0\r\n\r\n", "after a chunk of 2 bytes comes 'ay'"),
        (CHUNKED + b"2\r\nok\r\n", "closed"),
    ],
)
def test_broken_framing_is_named(
    client: Callable[..., Client], answer: bytes, complaint: str
) -> None:
    with client([answer]) as one:
        exchange = one.request(REQUEST, "GET")
        assert exchange.responses == ()
        assert complaint in exchange.connection


def test_a_connection_of_its_own_is_asked_how_it_is(client: Callable[..., Client]) -> None:
    one = client([GOOD, GOOD], [GOOD], [GOOD, b"nonsense\r\n"])
    states = [one.talk((REQUEST,), ("GET",)).connection for _ in range(3)]
    assert states[:2] == ["open", "closed"]
    assert "nonsense" in states[2]


def test_interim_responses_are_noted(client: Callable[..., Client]) -> None:
    one = client([b"HTTP/1.1 100 Continue\r\n\r\n", GOOD, GOOD])
    exchange = one.talk((REQUEST, b"body"), ("GET",))
    assert [(r.status, r.interim) for r in exchange.responses] == [(200, (100,))]
    assert exchange.connection == "open"
