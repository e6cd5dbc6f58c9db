"""Shapes for servers whose options change what every answer looks like."""

from __future__ import annotations

from typing import Any

from .differential_prompts import LONG
from .differential_shapes import (
    CHAT,
    COMPLETION,
    FRANCE,
    SMILE,
    Shape,
    chat_body,
    completion_body,
    encode,
    forced,
    request,
    user,
)

ROOT = "/gateway"
KEY, OTHER_KEY = "first-key", "second-key"
OPTIONS = (
    *("--served-model-name", "demo", "demo-alias"),
    *("--api-key", KEY, OTHER_KEY),
    *("--root-path", ROOT),
    "--enable-request-id-headers",
    "--enable-prompt-tokens-details",
    "--enable-force-include-usage",
    "--return-tokens-as-token-ids",
    *("--allowed-origins", '["https://chat.example"]'),
    *("--allowed-methods", '["GET", "POST"]'),
    "--allow-credentials",
    *("--scheduling-policy", "priority"),
    *("--stream-interval", "4"),
    *("--response-role", "bot"),
    *("--fingerprint-mode", "custom", "--fingerprint-value", "demo-fingerprint"),
    *("--override-generation-config", '{"temperature": 0, "max_new_tokens": 12}'),
    *("--max-logprobs", "2"),
)

_AUTHORIZED = {"authorization": f"Bearer {KEY}"}
_ORIGIN = {"origin": "https://chat.example"}
_DEFAULTS: dict[str, Any] = {"temperature": None, "max_tokens": None}
"""Leave temperature and limit to the server."""

_FIELDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {}),
    ("defaults", _DEFAULTS),
    ("defaults-exceeded", {"max_tokens": 30, "ignore_eos": True}),
    ("alias", {"model": "demo-alias"}),
    ("model-wrong", {"model": "no-such-model"}),
    ("priority", {"priority": -5}),
    ("stop", {"stop": "l of Fr"}),
    ("stop-included", {"stop": "l of Fr", "include_stop_str_in_output": True}),
    ("torn", forced(SMILE)),
    ("ignore-eos", {"ignore_eos": True, "max_tokens": 11}),
    ("interval-one", {"stream_interval": 1}),
    ("n-two", {"n": 2, "max_tokens": 3, "temperature": 1.0, "seed": 6}),
    ("max-tokens-zero", {"max_tokens": 0}),
    ("seed", {"temperature": 1.0, "seed": 4}),
)
_STREAMED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("usage-off", {"stream_options": {"include_usage": False}}),
    ("usage-on", {"stream_options": {"include_usage": True}}),
    ("usage-continuous-off", {"stream_options": {"continuous_usage_stats": False}}),
    ("usage-continuous", {"stream_options": {"continuous_usage_stats": True}}),
)


def _field_shapes() -> list[Shape]:
    shapes = []
    for route, path, make in (
        ("chat", CHAT, chat_body),
        ("completion", COMPLETION, completion_body),
    ):
        cases = [(name, fields) for name, fields in _FIELDS]
        cases += [(f"{name}-stream", {**fields, "stream": True}) for name, fields in _FIELDS]
        cases += [(name, {**fields, "stream": True}) for name, fields in _STREAMED]
        for name, fields in cases:
            body = make(**fields)
            shapes.append(request(f"{route}-{name}", path, body, headers=_AUTHORIZED))
    return shapes


def _cached_prompt_shapes() -> list[Shape]:
    """The second time, most of a long prompt comes from the prefix cache, and usage says so."""
    first = chat_body(messages=user(LONG), max_tokens=2)
    second = chat_body(messages=user(LONG, "Sorry.", FRANCE), max_tokens=2)
    salted = second | {"cache_salt": "pepper"}
    cases = (
        ("first", first),
        ("again", first),
        ("next-turn", second),
        ("next-turn-stream", second | {"stream": True}),
        ("salted", salted),
        ("salted-again", salted | {"stream": True}),
    )
    return [request(f"cached-{name}", CHAT, body, headers=_AUTHORIZED) for name, body in cases]


def _header_shapes() -> list[Shape]:
    cases: dict[str, dict[str, str]] = {
        "no-key": {},
        "other-key": {"authorization": f"Bearer {OTHER_KEY}"},
        "wrong-key": {"authorization": "Bearer third-key"},
        "longer-key": {"authorization": f"Bearer {KEY}x"},
        "key-in-lower-case-scheme": {"authorization": f"bearer {KEY}"},
        "key-without-scheme": {"authorization": KEY},
        "key-basic": {"authorization": "Basic Zmlyc3Q6a2V5"},
        "key-two-spaces": {"authorization": f"Bearer  {KEY}"},
        "key-as-x-api-key": {"x-api-key": KEY},
        "id": _AUTHORIZED | {"x-request-id": "from-the-header"},
        "id-without-key": {"x-request-id": "from-the-header"},
        "origin": _AUTHORIZED | _ORIGIN,
        "origin-and-cookie": _AUTHORIZED | _ORIGIN | {"cookie": "a=b"},
        "origin-other": _AUTHORIZED | {"origin": "https://elsewhere.example"},
        "origin-without-key": _ORIGIN,
        "priority": _AUTHORIZED | {"x-vllm-priority": "7"},
        "priority-broken": _AUTHORIZED | {"x-vllm-priority": "soon"},
        "session": _AUTHORIZED | {"x-session-id": "session-a"},
        "close": _AUTHORIZED | {"connection": "close"},
        "content-type": _AUTHORIZED | {"content-type": "text/plain"},
    }
    shapes = []
    for name, headers in cases.items():
        for stream in (False, True):
            title = f"header-{name}{'-stream' if stream else ''}"
            body = chat_body(max_tokens=2, stream=stream)
            shapes.append(request(title, CHAT, body, headers=headers))
    return shapes


def _route_shapes() -> list[Shape]:
    body = chat_body(max_tokens=2)
    stream = completion_body(max_tokens=2, stream=True)
    preflight = _ORIGIN | {"access-control-request-method": "POST"}
    elsewhere = preflight | {"origin": "https://elsewhere.example"}
    delete = preflight | {"access-control-request-method": "DELETE"}
    headed = preflight | {"access-control-request-headers": "authorization,x-mine"}
    return [
        request("root-chat", ROOT + CHAT, body, headers=_AUTHORIZED),
        request("root-chat-no-key", ROOT + CHAT, body),
        request("root-completion-stream", ROOT + COMPLETION, stream, headers=_AUTHORIZED),
        request("root-twice", ROOT + ROOT + CHAT, body, headers=_AUTHORIZED),
        request("root-slash", f"{ROOT}{CHAT}/", body, headers=_AUTHORIZED),
        request("slash", f"{CHAT}/", body, headers=_AUTHORIZED),
        request("body-broken", CHAT, b"{", headers=_AUTHORIZED),
        request("body-broken-no-key", CHAT, b"{"),
        request("body-large-no-key", CHAT, b"[" + b" " * 1_000_000),
        *(request(f"{method}-{key}", CHAT, method=method, headers=headers)
          for method in ("GET", "HEAD", "OPTIONS", "PUT")
          for key, headers in (("key", _AUTHORIZED), ("no-key", {}))),
        request("preflight", CHAT, method="OPTIONS", headers=preflight),
        request("preflight-headers", CHAT, method="OPTIONS", headers=headed),
        request("preflight-elsewhere", CHAT, method="OPTIONS", headers=elsewhere),
        request("preflight-method", CHAT, method="OPTIONS", headers=delete),
        request("models", "/v1/models", method="GET", headers=_AUTHORIZED),
        request("models-no-key", "/v1/models", method="GET"),
        request("models-root", f"{ROOT}/v1/models", method="GET", headers=_AUTHORIZED),
        request("health", "/health", method="GET"),
        request("version-root", f"{ROOT}/version", method="GET"),
        request("not-found", "/v1/no/such", method="GET", headers=_AUTHORIZED),
        request("not-found-no-key", "/v1/no/such", method="GET"),
        request("tokenize-no-key", "/tokenize", {"model": "demo", "prompt": "Hello"}),
        Shape("wire-no-key-then-key",
              (encode(CHAT, body) + encode(CHAT, body, headers=_AUTHORIZED),),
              ("POST", "POST"), alone=True),
        Shape("wire-no-key-large-body", (encode(CHAT, b" " * 1_000_000),), alone=True),
    ]  # fmt: skip


def guarded_shapes() -> list[Shape]:
    """Shapes for a pair started with OPTIONS."""
    return [
        *_field_shapes(),
        *_cached_prompt_shapes(),
        *_header_shapes(),
        *_route_shapes(),
    ]
