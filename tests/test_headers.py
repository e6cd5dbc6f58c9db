"""Headers of the lane: what sends a request to vLLM's own code, and what answers begin with."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from starlette.middleware.cors import CORSMiddleware

from scalellm_plugins.frontends.headers import CrossOrigin, HeaderReader

JSON = (b"content-type", b"application/json")


def app(*middlewares: Any) -> Any:
    return SimpleNamespace(user_middleware=list(middlewares))


def cors(**options: Any) -> Any:
    return SimpleNamespace(cls=CORSMiddleware, args=(), kwargs=options)


def reader(*keys: str, echo: bool = False, of: Any = None) -> HeaderReader:
    args = Namespace(enable_request_id_headers=echo)
    return HeaderReader(of or app(), args, ["demo", "other-name"], keys)


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (b"application/json", True),
        (b"Application/JSON; charset=utf-8", True),
        (b"application/json;x", True),
        (b"text/plain", False),
        (b"application/jsonl", False),
        (b"", False),
    ],
)
def test_only_json_is_taken(value: bytes, taken: bool) -> None:
    """vLLM refuses anything else, in its words."""
    assert (reader().read([(b"content-type", value)]) is not None) == taken
    assert reader().read([]) is None


@pytest.mark.parametrize(
    "name", [b"x-data-parallel-rank", b"endpoint-load-metrics-format", b"upgrade"]
)
def test_headers_for_vllms_own_code_decline(name: bytes) -> None:
    assert reader().read([JSON, (name, b"1")]) is None
    assert reader().read([(name, b"1"), JSON]) is None


def test_what_requests_carry_is_read_as_vllm_reads_it() -> None:
    """The first of several, as Starlette's mapping has it; a bad number is none."""
    asked = reader().read(
        [
            (b"x-request-id", b"first\xe4"),
            (b"x-request-id", b"second"),
            JSON,
            (b"x-session-id", b"s"),
            (b"x-session-id", b"t"),
            (b"x-vllm-priority", b"-3"),
            (b"origin", b"http://a"),
        ]
    )
    assert asked is not None
    assert (asked.request_id, asked.session_id) == ("firstä", "s")
    assert (asked.priority, asked.origin) == (-3, b"http://a")
    asked = reader().read([JSON, (b"x-vllm-priority", b"high")])
    assert asked is not None
    assert asked.priority is None


def test_terms_are_taken_along_and_mistakes_are_vllms_own_business() -> None:
    """Where they are refused in the same words as those of bodies (test_terms_server.py)."""
    asked = reader().read([JSON, (b"x-scalellm-tpot-ms", b"2.5"), (b"x-scalellm-tenant", b"a")])
    assert asked is not None
    assert asked.terms == {"scalellm_tpot_ms": 2.5, "scalellm_tenant": "a"}
    asked = reader().read([JSON, (b"x-vllm-priority", b"3")])
    assert asked is not None
    assert asked.terms is None
    for wrong in [(b"x-scalellm-tpot-ms", b"0"), (b"x-scalellm-topt-ms", b"5")]:
        assert reader().read([JSON, wrong]) is None


@pytest.mark.parametrize(
    ("value", "right"),
    [
        (b"Bearer one", True),
        (b"bearer two", True),
        (b"Bearer three", False),
        (b"Bearer  one", False),
        (b"Bearer one ", False),
        (b"Basic one", False),
        (b"one", False),
        (b"", False),
        (None, False),
    ],
)
def test_keys_are_vllms(value: bytes | None, right: bool) -> None:
    given = [] if value is None else [(b"authorization", value)]
    assert (reader("one", "two").read([JSON, *given]) is not None) == right
    assert reader().read([JSON, *given]) is not None, "without keys every request may"


@pytest.mark.vllm
@pytest.mark.parametrize(
    "value", [b"Bearer one", b"bearer one", b"BEARER two", b"Bearer  one", b"Bearer x", b"one", b""]
)
async def test_keys_are_judged_as_by_vllms_middleware(value: bytes) -> None:
    pytest.importorskip("vllm")
    from starlette.datastructures import Headers
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    middleware = AuthenticationMiddleware(lambda *_args: None, ["one", "two"])
    expected = middleware.verify_token(Headers(raw=[(b"authorization", value)]))
    read = reader("one", "two").read([JSON, (b"authorization", value)])
    assert (read is not None) == expected


def test_adapters_are_vllms_own_business() -> None:
    made = reader()
    assert [made.serves(name) for name in ("demo", "other-name", None, "", "lora")] == [
        *(True, True, True, True),
        False,
    ]


def exchange(defaults: list[tuple[bytes, bytes]], **others: Any) -> Any:
    """An answer, as far as its headers go."""
    cycle = SimpleNamespace(scope={"headers": others.pop("headers", [])}, keep_alive=True)
    cycle.__dict__.update(others)
    server_state = SimpleNamespace(default_headers=defaults)
    return SimpleNamespace(
        cycle=cycle,
        connection=SimpleNamespace(server_state=server_state),
        ask=SimpleNamespace(origin=None),
        extra_headers=[],
    )


def head(made: HeaderReader, answer: Any, body: bytes | None = b"12345", status: int = 200) -> Any:
    """Return (status line, headers) and check the form."""
    raw = made.answer(answer, status, b"application/json", body)
    assert raw.endswith(b"\r\n\r\n")
    first, *lines = raw[:-4].split(b"\r\n")
    return first, dict(line.split(b": ", 1) for line in lines)


def test_answers_begin_as_uvicorns() -> None:
    made = reader()
    defaults = [(b"date", b"today"), (b"server", b"uvicorn")]
    first, headers = head(made, exchange(defaults))
    assert first == b"HTTP/1.1 200 OK"
    assert headers == {
        b"date": b"today",
        b"server": b"uvicorn",
        b"content-length": b"5",
        b"content-type": b"application/json",
    }
    # uvicorn replaces the list once per second: the date of another second must not stay.
    _, headers = head(made, exchange([(b"date", b"tomorrow")]))
    assert headers[b"date"] == b"tomorrow"
    first, headers = head(made, exchange([], keep_alive=False), None, 500)
    assert first == b"HTTP/1.1 500 Internal Server Error"
    assert headers[b"connection"] == b"close"
    assert headers[b"transfer-encoding"] == b"chunked"
    assert b"content-length" not in headers


def test_request_ids_are_echoed_where_vllm_does() -> None:
    given = [(b"x-request-id", b"first"), (b"x-request-id", b"second")]
    _, headers = head(reader(echo=True), exchange([], headers=given))
    assert headers[b"x-request-id"] == b"first"
    made = [head(reader(echo=True), exchange([]))[1][b"x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    _, headers = head(reader(), exchange([], headers=given))
    assert b"x-request-id" not in headers


@pytest.mark.parametrize("credentials", [False, True])
@pytest.mark.parametrize("origins", [["*"], ["http://a"]])
@pytest.mark.parametrize("origin", [None, b"http://a", b"http://b"])
async def test_cross_origin_headers_are_the_middlewares(
    credentials: bool, origins: list[str], origin: bytes | None
) -> None:
    options = {"allow_origins": origins, "allow_credentials": credentials}
    sent: list[Any] = []

    async def answers(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if origin is None else [(b"origin", origin)]
    scope = {"type": "http", "method": "POST", "headers": headers}
    await CORSMiddleware(answers, **options)(scope, None, send)  # type: ignore[arg-type]
    expected = b"".join(b"%b: %b\r\n" % pair for pair in sent[0]["headers"])
    made = CrossOrigin(app(cors(**options)))
    assert made.lines(origin) == made.lines(origin) == expected
    assert CrossOrigin(app()).lines(origin) == b""


def test_origins_are_forgotten_before_they_fill_the_memory() -> None:
    made = CrossOrigin(app(cors(allow_origins=["*"])))
    for number in range(1000):
        made.lines(b"http://%d" % number)
    assert len(made._known) <= 256
