"""Shapes about HTTP: bodies that are no JSON, odd framing, methods, headers, other routes."""

from __future__ import annotations

import json
from typing import Any

from .differential_client import AUTHORITY
from .differential_shapes import (
    CHAT,
    COMPLETION,
    FRANCE,
    PROMPT,
    Shape,
    chat_body,
    completion_body,
    encode,
    request,
    user,
)

_SHORT = {CHAT: chat_body(max_tokens=3), COMPLETION: completion_body(max_tokens=3)}
_STREAM = {path: body | {"stream": True} for path, body in _SHORT.items()}
_HOST = f"host: {AUTHORITY}"
_JSON = "content-type: application/json"
_ORIGIN = {"origin": "https://chat.example"}
_PREFLIGHT = {
    **_ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def _bodies(path: str) -> dict[str, Any]:
    """{name: body} of what is no proper request. (One table, so longer than a function should.)"""
    good = json.dumps(_SHORT[path])
    head = good[:-1]
    return {
        "empty": b"",
        "no-body": None,
        "blank": "  \n",
        "not-json": "What is the capital of France?",
        "cut": good[:-10],
        "trailing-text": good + " and so on",
        "trailing-comma": head + ",}",
        "single-quotes": good.replace('"', "'"),
        "comment": head + "/* */}",
        "null": "null",
        "array": "[]",
        "array-of-request": f"[{good}]",
        "string": json.dumps(good),
        "number": "5",
        "empty-object": "{}",
        "nan": head + ', "top_p": NaN}',
        "infinity": head + ', "temperature": Infinity}',
        "minus-infinity": head + ', "frequency_penalty": -Infinity}',
        "float-overflow": head + ', "top_p": 1e999}',
        "big-integer": head + ', "seed": ' + "9" * 400 + "}",
        "too-many-digits": head + ', "seed": ' + "9" * 5000 + "}",
        "duplicate-keys": head + ', "max_tokens": 2, "max_tokens": 1}',
        "deep": head + ', "deep": ' + "[" * 500 + "]" * 500 + "}",
        "very-deep": head + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "bom": b"\xef\xbb\xbf" + good.encode(),
        "utf-16": good.encode("utf-16"),
        "latin-1": good.replace("France", "Österreich").encode("latin-1"),
        "raw-control-character": good.replace("France", "Fra\x01nce"),
        "bad-escape": good.replace("France", "\\x41"),
        "lone-surrogate-escape": good.replace("France", "\\ud83d"),
        "surrogate-pair-escape": good.replace("France", "\\ud83d\\ude00"),
        "pretty-printed": json.dumps(_SHORT[path], indent=4),
        "white-space-around": f"\n\t {good} \r\n",
        "key-escaped": good.replace('"model"', '"\\u006dodel"'),
        "large": json.dumps(_SHORT[path] | {"user": "x" * 1_000_000}),
        "large-prompt": good.replace("France", "France " * 150_000),
    }


def _body_shapes() -> list[Shape]:
    shapes = []
    for route, path in (("chat", CHAT), ("completion", COMPLETION)):
        for name, body in _bodies(path).items():
            shapes.append(request(f"body-{route}-{name}", path, body))
    return shapes


def _header_shapes() -> list[Shape]:
    cases: dict[str, dict[str, str]] = {
        "content-type-missing": {"content-type": ""},
        "content-type-text": {"content-type": "text/plain"},
        "content-type-form": {"content-type": "application/x-www-form-urlencoded"},
        "content-type-charset": {"content-type": "application/json; charset=utf-8"},
        "content-type-charset-latin": {"content-type": "application/json; charset=latin-1"},
        "content-type-upper": {"content-type": "APPLICATION/JSON"},
        "content-type-suffix": {"content-type": "application/vnd.api+json"},
        "content-type-json-seq": {"content-type": "application/json-seq"},
        "content-type-broken": {"content-type": "json"},
        "accept-sse": {"accept": "text/event-stream"},
        "accept-other": {"accept": "image/png"},
        "accept-encoding": {"accept-encoding": "gzip, br"},
        "content-encoding": {"content-encoding": "gzip"},
        "authorization": {"authorization": "Bearer whatever"},
        "priority": {"x-vllm-priority": "2"},
        "priority-zero": {"x-vllm-priority": "0"},
        "priority-broken": {"x-vllm-priority": "high"},
        "session": {"x-session-id": "session-a"},
        "data-parallel-rank": {"x-data-parallel-rank": "0"},
        "data-parallel-rank-broken": {"x-data-parallel-rank": "x"},
        "load-format": {"endpoint-load-metrics-format": "text"},
        "trace": {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
        "close": {"connection": "close"},
        "origin": _ORIGIN,
        "origin-null": {"origin": "null"},
        "cookie": {"cookie": "a=b"},
        "forwarded": {"x-forwarded-for": "10.1.2.3", "x-forwarded-proto": "https"},
        "range": {"range": "bytes=0-5"},
        "large": {"x-large": "y" * 20_000},
    }
    shapes = []
    for name, headers in cases.items():
        shapes += [
            request(f"header-chat-{name}", CHAT, _STREAM[CHAT], headers=headers),
            request(f"header-completion-{name}", COMPLETION, _SHORT[COMPLETION], headers=headers),
        ]
    return shapes


def _method_shapes() -> list[Shape]:
    shapes = []
    for route, path in (("chat", CHAT), ("completion", COMPLETION)):
        for method in ("GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"):
            shapes.append(request(f"{method}-{route}", path, method=method))
        shapes += [
            request(f"OPTIONS-{route}-preflight", path, method="OPTIONS", headers=_PREFLIGHT),
            request(f"PUT-{route}-body", path, _SHORT[path], method="PUT"),
            request(f"path-{route}-slash", f"{path}/", _SHORT[path]),
            request(f"path-{route}-query", f"{path}?a=b&c", _SHORT[path]),
            request(f"path-{route}-doubled-slash", f"/{path}", _SHORT[path]),
            request(f"path-{route}-upper", path.upper(), _SHORT[path]),
            request(f"path-{route}-escaped", path.replace("v1", "%761"), _SHORT[path]),
            request(f"path-{route}-absolute", f"http://{AUTHORITY}{path}", _SHORT[path]),
            request(f"path-{route}-without-v1", path.removeprefix("/v1"), _SHORT[path]),
        ]
    return shapes


def _lines(*lines: str, body: bytes = b"") -> bytes:
    return "\r\n".join([*lines, "", ""]).encode() + body


def _chunked(data: bytes, size: int) -> bytes:
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


def _connection_shapes() -> list[Shape]:
    """Shapes with a connection of their own: what happens to it is part of the answer."""
    shapes = []
    for name, body in (("chat", _SHORT[CHAT]), ("stream", _STREAM[CHAT])):
        shapes += _framings(name, CHAT, json.dumps(body).encode())
    shapes += _framings("completion", COMPLETION, json.dumps(_SHORT[COMPLETION]).encode())
    good, stream = encode(CHAT, _SHORT[CHAT]), encode(COMPLETION, _STREAM[COMPLETION])
    health = encode("/health", method="GET")
    bad = encode(CHAT, b"{")
    posts = ("POST",) * 3
    close = {"connection": "close"}
    return [
        *shapes,
        Shape("wire-pipelined", (good + stream + good,), posts, alone=True),
        Shape("wire-pipelined-after-error", (bad + good,), posts[:2], alone=True),
        Shape("wire-pipelined-mixed", (good + health + stream,), ("POST", "GET", "POST"), True),
        Shape("wire-pipelined-after-close",
              (encode(CHAT, _SHORT[CHAT], headers=close) + good,), posts[:2], True),
        Shape("wire-error-then-open", (bad,), alone=True),
        Shape("wire-garbage", (b"GARBAGE\r\n\r\n",), alone=True),
        Shape("wire-tls-hello", (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",), (), True),
        Shape("wire-method-unknown", (encode(CHAT, _SHORT[CHAT], method="BREW"),), alone=True),
        Shape("wire-http-2-preface", (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",), alone=True),
        Shape("wire-head-health", (encode("/health", method="HEAD"),), ("HEAD",), True),
        Shape("wire-lower-case-method", (encode(CHAT, _SHORT[CHAT], method="post"),), alone=True),
        Shape("wire-header-without-colon",
              (_lines(f"POST {CHAT} HTTP/1.1", _HOST, "nonsense"),), alone=True),
    ]  # fmt: skip


def _framings(name: str, path: str, data: bytes) -> list[Shape]:
    """One request in every way HTTP can frame it."""
    length = f"content-length: {len(data)}"
    line, old = f"POST {path} HTTP/1.1", f"POST {path} HTTP/1.0"
    chunked = "transfer-encoding: chunked"
    expect = _lines(line, _HOST, _JSON, length, "expect: 100-continue")
    cases: dict[str, tuple[bytes, ...]] = {
        "http-1.0": (_lines(old, _HOST, _JSON, length, body=data),),
        "http-1.0-keep-alive":
            (_lines(old, _HOST, _JSON, length, "connection: keep-alive", body=data),),
        "http-1.1-close": (_lines(line, _HOST, _JSON, length, "connection: close", body=data),),
        "no-host": (_lines(line, _JSON, length, body=data),),
        "chunked": (_lines(line, _HOST, _JSON, chunked, body=_chunked(data, 7)),),
        "chunked-once": (_lines(line, _HOST, _JSON, chunked, body=_chunked(data, 10**6)),),
        "chunked-broken": (_lines(line, _HOST, _JSON, chunked, body=b"zz\r\n{}\r\n0\r\n\r\n"),),
        "chunked-and-length":
            (_lines(line, _HOST, _JSON, length, chunked, body=_chunked(data, 50)),),
        "expect-continue": (expect, data),
        "expect-continue-at-once": (expect + data,),
        "expect-other": (_lines(line, _HOST, _JSON, length, "expect: tea", body=data),),
        "lengths-differ": (_lines(line, _HOST, _JSON, length, "content-length: 3", body=data),),
        "length-negative": (_lines(line, _HOST, _JSON, "content-length: -1", body=data),),
        "length-missing": (_lines(line, _HOST, _JSON, body=data),),
        "upgrade-h2c": (_lines(line, _HOST, _JSON, length, "connection: upgrade, http2-settings",
                               "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__", body=data),),
        "keep-alive-header": (_lines(line, _HOST, _JSON, length, "connection: keep-alive",
                                     body=data),),
    }  # fmt: skip
    return [Shape(f"wire-{name}-{case}", raw, alone=True) for case, raw in cases.items()]


def _route_shapes() -> list[Shape]:
    """Other routes, which are upstream's own."""
    responses = {"model": "demo", "input": FRANCE, "temperature": 0, "max_output_tokens": 16}
    messages = {"model": "demo", "messages": user(FRANCE), "temperature": 0, "max_tokens": 16}
    batch = chat_body(messages=[user(FRANCE)], max_tokens=3)
    gets = (
        "/v1/models /v1/models/demo /health /version /ping /load / /v1 /v1/no/such /v1/responses/x"
    )
    return [
        *(request(f"GET-{path}", path, method="GET") for path in gets.split()),
        *(request(f"HEAD-{path}", path, method="HEAD") for path in ("/v1/models", "/health")),
        request("GET-/v1/models-origin", "/v1/models", method="GET", headers=_ORIGIN),
        request("tokenize", "/tokenize", {"model": "demo", "prompt": "Hello 😀"}),
        request("tokenize-chat", "/tokenize", {"model": "demo", "messages": user(FRANCE)}),
        request("tokenize-wrong", "/tokenize", {"model": "demo"}),
        request("detokenize", "/detokenize", {"model": "demo", "tokens": [488, 178, 259]}),
        request("responses", "/v1/responses", responses),
        request("responses-stream", "/v1/responses", responses | {"stream": True}),
        request("responses-wrong", "/v1/responses", {"model": "demo"}),
        request("messages", "/v1/messages", messages),
        request("messages-stream", "/v1/messages", messages | {"stream": True}),
        request("messages-wrong", "/v1/messages", {"model": "demo"}),
        request("count-tokens", "/v1/messages/count_tokens", messages),
        request("invocations", "/invocations", _SHORT[CHAT]),
        request("invocations-stream", "/invocations", _STREAM[COMPLETION]),
        request("batch", f"{CHAT}/batch", batch),
        request("batch-wrong", f"{CHAT}/batch", _SHORT[CHAT]),
        request("render", f"{CHAT}/render", _SHORT[CHAT]),
        request("embeddings", "/v1/embeddings", {"model": "demo", "input": PROMPT}),
    ]


def wire_shapes() -> list[Shape]:
    """Shapes of HTTP itself, and of routes that are upstream's own."""
    return [
        *_body_shapes(),
        *_header_shapes(),
        *_method_shapes(),
        *_connection_shapes(),
        *_route_shapes(),
    ]
