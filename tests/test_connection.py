"""uvicorn's connection with a lane before the application: bytes in, bytes out, in order."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("uvicorn")
pytest.importorskip("httptools")

import uvicorn
from uvicorn.server import ServerState

from scalellm_plugins.frontends.connection import FastLaneProtocol

PATH = "/v1/chat/completions"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlane"


class Lane:
    """Takes or declines; `late` answers when it is told to."""

    def __init__(self, *, takes: bool = True, late: bool = False) -> None:
        self.takes, self.late = takes, late
        self.bodies: list[bytes] = []
        self.waiting: list[tuple[Any, Any]] = []
        self.accounting = SimpleNamespace(own_log=False)

    def may_take(self, cycle: Any) -> bool:
        return cycle.scope["path"] == PATH and not cycle.waiting_for_100_continue

    def take(self, connection: Any, cycle: Any) -> bool:
        self.bodies.append(bytes(cycle.body))
        if not self.takes:
            return False
        connection.answer = SimpleNamespace(
            cycle=cycle, gone=lambda: self.waiting.clear(), paused=False, flush=lambda: None
        )
        self.waiting.append((connection, cycle))
        if not self.late:
            self.answer()
        return True

    def answer(self) -> None:
        """Answer the request that waits."""
        ((connection, cycle),) = self.waiting
        self.waiting.clear()
        cycle.response_started = True
        connection.write(ANSWER)
        connection.finish(cycle)


class Application:
    """Stands for vLLM's: says what it was given."""

    def __init__(self, lane: Lane | None) -> None:
        self.state = SimpleNamespace()
        if lane is not None:
            self.state.scalellm_lane = lane
        self.bodies: list[bytes] = []
        self.disconnected = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected += 1
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        text = hashlib.sha256(body).hexdigest().encode()
        headers = [(b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})


class Transport(asyncio.Transport):
    """A connection in memory. Its reading can be paused; the test delivers all the same."""

    def __init__(self, sock: socket.socket | None = None) -> None:
        super().__init__({"socket": sock})
        self.data = b""
        self.closed = False
        self.pauses = 0
        self.queued = 0

    def write(self, data: Any) -> None:
        assert not self.closed, "written after it was closed"
        self.data += bytes(data)

    def get_write_buffer_size(self) -> int:
        return self.queued

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.pauses += 1

    def resume_reading(self) -> None:
        pass


class Bed:
    """One connection."""

    def __init__(self, lane: Lane | None, sock: socket.socket | None = None) -> None:
        self.app = Application(lane)
        config = uvicorn.Config(self.app, http=FastLaneProtocol, lifespan="off", log_config=None)
        self.config = config
        config.load()
        # uvicorn wraps the application in its middleware; the lane looks at the inner one.
        self.protocol = FastLaneProtocol(config, ServerState(), {})
        self.transport = Transport(sock)
        self.protocol.connection_made(self.transport)

    async def send(self, *pieces: bytes) -> bytes:
        """Deliver pieces, let everything run, and return all that was written."""
        for piece in pieces:
            self.protocol.data_received(piece)
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        return self.transport.data


def post(body: bytes, path: str = PATH, version: str = "1.1", *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/{version}", "host: x", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@given(cuts=st.lists(st.integers(1, 400), max_size=6), size=st.sampled_from([0, 1, 300]))
def test_a_body_in_pieces_is_taken_when_it_is_complete(cuts: list[int], size: int) -> None:
    async def run() -> None:
        lane = Lane()
        bed = Bed(lane)
        body = bytes(range(256)) * 2
        body = body[:size]
        raw = post(body)
        edges = sorted({0, *[cut for cut in cuts if cut < len(raw)], len(raw)})
        pieces = [raw[start:end] for start, end in pairwise(edges)]
        assert await bed.send(*pieces[:-1]) == b""
        assert lane.bodies == []
        assert await bed.send(pieces[-1]) == ANSWER
        assert lane.bodies == [body]
        assert bed.app.bodies == []

    asyncio.run(run())


@pytest.mark.parametrize("size", [0, 5, 200_000])
@pytest.mark.parametrize("pieces", [1, 4])
async def test_what_the_lane_declines_reaches_the_application_whole(size: int, pieces: int) -> None:
    lane = Lane(takes=False)
    bed = Bed(lane)
    body = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    raw = post(body)
    step = len(raw) // pieces + 1
    written = await bed.send(*[raw[at : at + step] for at in range(0, len(raw), step)])
    assert lane.bodies == bed.app.bodies == [body]
    assert written.endswith(hashlib.sha256(body).hexdigest().encode())


async def test_a_large_body_for_the_lane_is_not_paused() -> None:
    """Nobody reads it before it is complete: a paused connection would wait for ever."""
    lane = Lane()
    bed = Bed(lane)
    raw = post(b"x" * 300_000)
    for at in range(0, len(raw), 60_000):
        await bed.send(raw[at : at + 60_000])
    assert bed.transport.pauses == 0
    assert bed.transport.data == ANSWER


async def test_a_chunked_body_is_taken() -> None:
    lane = Lane()
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    assert await Bed(lane).send(head, b"3\r\nabc\r\n", b"2\r\nde\r\n", b"0\r\n\r\n") == ANSWER
    assert lane.bodies == [b"abcde"]


@pytest.mark.parametrize("takes", [True, False])
@pytest.mark.parametrize("first", ["lane", "application"])
async def test_pipelined_requests_are_answered_in_order(takes: bool, first: str) -> None:
    lane = Lane(takes=takes)
    bed = Bed(lane)
    other = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    requests = [post(b"one"), other, post(b"two"), post(b"three"), other]
    if first == "application":
        requests = requests[1:]
    written = await bed.send(b"".join(requests))
    texts = {
        body: hashlib.sha256(body).hexdigest().encode() for body in (b"", b"one", b"two", b"three")
    }
    expected = [
        texts[b""] if raw == other else b"lane" if takes else texts[raw.rpartition(b"\n")[2]]
        for raw in requests
    ]
    found = [part.partition(b"\r\n\r\n")[2] for part in written.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert found == expected


async def test_a_pipelined_request_waits_for_the_one_before() -> None:
    lane = Lane(late=True)
    bed = Bed(lane)
    assert await bed.send(post(b"one") + post(b"two")) == b""
    assert lane.bodies == [b"one"]
    lane.answer()
    assert lane.bodies == [b"one", b"two"]
    lane.answer()
    assert await bed.send() == ANSWER * 2


async def test_a_pipelined_body_that_is_late_is_still_complete() -> None:
    """Half of it comes while another request is served, half when it is its own turn."""
    lane = Lane(late=True)
    bed = Bed(lane)
    second = post(b"second body")
    await bed.send(post(b"one") + second[:-6])
    lane.answer()
    assert lane.bodies == [b"one"]
    await bed.send(second[-6:])
    assert lane.bodies == [b"one", b"second body"]
    lane.answer()
    assert bed.transport.data == ANSWER * 2


@pytest.mark.parametrize(
    ("version", "headers", "closes"),
    [
        ("1.1", (), False),
        ("1.1", ("connection: close",), True),
        ("1.1", ("connection: keep-alive",), False),
        ("1.0", (), True),
        ("1.0", ("connection: keep-alive",), True),  # uvicorn closes those, too
    ],
)
async def test_connections_are_kept_as_uvicorn_keeps_them(
    version: str, headers: tuple[str, ...], closes: bool
) -> None:
    ours, theirs = Bed(Lane()), Bed(None)
    for bed in (ours, theirs):
        await bed.send(post(b"x", PATH, version, *headers))
    assert ours.transport.closed == theirs.transport.closed == closes
    if not closes:
        # uvicorn's timer of idle connections runs, and the next request is served.
        assert ours.protocol.timeout_keep_alive_task is not None
        assert await ours.send(post(b"y")) == ANSWER * 2


async def test_a_client_that_waits_for_100_continue_is_the_applications() -> None:
    lane = Lane()
    bed = Bed(lane)
    raw = post(b"x", PATH, "1.1", "expect: 100-continue")
    written = await bed.send(raw[:-1])
    assert written.startswith(b"HTTP/1.1 100 Continue")
    await bed.send(raw[-1:])
    assert (lane.bodies, bed.app.bodies) == ([], [b"x"])


async def test_other_routes_are_the_applications() -> None:
    lane = Lane()
    bed = Bed(lane)
    await bed.send(post(b"x", "/v1/embeddings"))
    assert (lane.bodies, bed.app.bodies) == ([], [b"x"])


async def test_without_a_lane_it_is_uvicorns_connection() -> None:
    bed = Bed(None)
    await bed.send(post(b"x"), post(b"y"))
    assert bed.app.bodies == [b"x", b"y"]


@pytest.mark.parametrize("gated", [False, True])
async def test_what_no_limit_is_about_is_accounted_for_all_the_same(gated: bool) -> None:
    """Behind a gate, requests without a pass (no work for the engine) are not the lane's."""
    lane = Lane()
    lane.accounting.own_log = True
    served: list[str] = []

    def logged(app: Any) -> Any:
        async def noting(scope: Any, receive: Any, send: Any) -> None:
            served.append(scope["path"])
            await app(scope, receive, send)

        return noting

    lane.accounting.logged = logged
    lane.catch_up = lambda: served.append("caught up")  # type: ignore[attr-defined]
    bed = Bed(lane)
    if gated:
        bed.protocol.gate = SimpleNamespace(admit=lambda *_: True)  # type: ignore[assignment]
    written = await bed.send(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
    assert written.startswith(b"HTTP/1.1 200")
    assert served == ["caught up", "/metrics"]
    assert bed.protocol.cycle.access_log is False, "uvicorn would write a line, too"
    if gated:
        await bed.send(post(b"no pass"))
        assert (lane.bodies, bed.app.bodies[1:]) == ([], [b"no pass"])


async def test_a_client_that_leaves_within_its_body_asks_for_nothing() -> None:
    lane = Lane()
    bed = Bed(lane)
    await bed.send(post(b"half")[:-2])
    bed.protocol.connection_lost(None)
    await bed.send()
    assert (lane.bodies, bed.app.bodies) == ([], [])


@pytest.mark.parametrize("pipelined", [False, True])
async def test_the_lane_hears_at_once_of_a_client_that_leaves(pipelined: bool) -> None:
    lane = Lane(late=True)
    bed = Bed(lane)
    await bed.send(post(b"one") + (post(b"two") if pipelined else b""))
    ((_, cycle),) = lane.waiting
    bed.protocol.connection_lost(ConnectionResetError())
    assert lane.waiting == []
    assert cycle.disconnected
    assert bed.protocol.answer is None
    assert lane.bodies == [b"one"]


async def test_a_late_refusal_of_a_client_that_left_starts_nothing() -> None:
    lane = Lane(late=True)
    bed = Bed(lane)
    await bed.send(post(b"one"))
    ((connection, cycle),) = lane.waiting
    bed.protocol.connection_lost(None)
    connection.pass_on(cycle)
    await bed.send()
    assert bed.app.bodies == []


async def test_a_late_refusal_goes_to_the_application() -> None:
    """A long prompt is tokenized elsewhere, and only then found not to be for the lane."""
    lane = Lane(late=True)
    bed = Bed(lane)
    await bed.send(post(b"one"))
    ((connection, cycle),) = lane.waiting
    connection.pass_on(cycle)
    await bed.send()
    assert bed.app.bodies == [b"one"]


async def test_an_answer_is_told_that_its_client_is_slow() -> None:
    lane = Lane(late=True)
    bed = Bed(lane)
    await bed.send(post(b"one"))
    answer = bed.protocol.answer
    assert answer is not None
    flushed: list[bool] = []
    answer.flush = lambda: flushed.append(answer.paused)  # type: ignore[method-assign]
    bed.protocol.pause_writing()
    assert answer.paused
    bed.protocol.resume_writing()
    assert flushed == [False]


# Straight to the socket


@pytest.fixture
def pair() -> Any:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    for one in (ours, theirs):
        one.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def received(sock: socket.socket) -> bytes:
    data = b""
    while True:
        try:
            data += sock.recv(1 << 20)
        except BlockingIOError:
            return data


async def test_bytes_go_straight_to_the_socket(pair: Any) -> None:
    ours, theirs = pair
    bed = Bed(Lane(), ours)
    await bed.send(post(b"x"))
    assert (received(theirs), bed.transport.data) == (ANSWER, b"")


async def test_what_the_socket_does_not_take_is_the_transports(pair: Any) -> None:
    """In order, and nothing twice: first what was taken, then the rest, then what follows."""
    ours, theirs = pair
    bed = Bed(Lane(late=True), ours)
    data = bytes(range(256)) * 4096
    bed.protocol.write(data)
    assert bed.transport.data
    bed.transport.queued = len(bed.transport.data)
    taken = received(theirs)
    bed.protocol.write(b"next")
    assert received(theirs) == b"", "it overtook what is queued"
    assert taken + bed.transport.data == data + b"next"


async def test_a_lost_socket_is_left_to_the_transport(pair: Any) -> None:
    ours, theirs = pair
    bed = Bed(Lane(late=True), ours)
    theirs.close()
    bed.protocol.write(b"x")
    bed.protocol.write(b"y")
    assert bed.transport.data == b"xy"
    bed.transport.closed = True
    with pytest.raises(AssertionError, match="closed"):
        bed.protocol.write(b"z")
