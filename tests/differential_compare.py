"""What two servers' answers must agree on, and the list of where they do not.

An answer is brought into a canonical form (plain dictionaries and lists) in which everything that
may differ is gone: ids, timestamps, and where a stream was cut into chunks. Two canonical forms
are then compared field by field.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

from .differential_client import Exchange, Response
from .differential_streams import canonical_stream

FLOAT_TOLERANCE = 1e-4
"""Between log probabilities. Both servers run the same arithmetic on the same machine."""

_RANDOM_ID = re.compile(r"(?<![0-9a-z])[0-9a-f]{8}(-?[0-9a-f]{4}){2,}(?![0-9a-z])")
_ID_KEYS = frozenset({"id", "item_id", "response_id", "request_id"})
_TIME_KEYS = frozenset({"created", "created_at", "completed_at"})
_CLOCK_SLACK_S = 3600


def canonical(exchange: Exchange) -> dict[str, Any]:
    """The canonical form of everything that an exchange showed."""
    return {
        "connection": exchange.connection,
        "responses": [_canonical_response(response) for response in exchange.responses],
    }


def differences(upstream: Any, ours: Any, path: str = "") -> list[str]:
    """Every field in which two canonical forms differ, as "path: upstream …, ours …"."""
    if isinstance(upstream, dict) and isinstance(ours, dict):
        found = []
        for key in {**upstream, **ours}:
            inner = f"{path}.{key}" if path else str(key)
            if key == "content_keys" and not (upstream[key] and ours.get(key, ["none"])):
                continue  # one of them sent all content with the finish: a chunk boundary
            if key not in ours:
                found.append(f"{inner}: upstream {_show(upstream[key])}, ours has no such key")
            elif key not in upstream:
                found.append(f"{inner}: upstream has no such key, ours {_show(ours[key])}")
            else:
                found += differences(upstream[key], ours[key], inner)
        return found
    if isinstance(upstream, list) and isinstance(ours, list) and len(upstream) == len(ours):
        pairs = enumerate(zip(upstream, ours, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{path}[{i}]")]
    if _same(upstream, ours):
        return []
    return [f"{path}: upstream {_show(upstream)}, ours {_show(ours)}"]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= FLOAT_TOLERANCE
    # True == 1 in Python, and not in JSON.
    return bool(type(a) is type(b) and a == b)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}… ({len(text)} characters)"


def _canonical_response(response: Response) -> dict[str, Any]:
    return {
        "version": response.version,
        "status": response.status,
        "reason": response.reason,
        "interim": list(response.interim),
        "framing": response.framing,
        "headers": _canonical_headers(response.headers),
        "body": _canonical_body(response),
    }


def _canonical_headers(headers: tuple[tuple[str, str], ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in headers:
        if name in ("date", "content-length"):
            value = "<present>"  # what the length says is checked by reading that much
        elif name == "x-request-id":
            value = _RANDOM_ID.sub("<random>", value)
        found.setdefault(name, []).append(value)
    return {name: found[name] for name in sorted(found)}


def _canonical_body(response: Response) -> Any:
    if response.framing == "none":
        return None
    content_type = response.header("content-type") or ""
    if content_type.startswith("text/event-stream"):
        return _canonical_json(canonical_stream(response.body))
    if content_type.startswith("application/json"):
        try:
            return {"json": _canonical_json(json.loads(response.body))}
        except ValueError:
            return {"broken json": response.body.decode("utf-8", "replace")}
    return {"text": response.body.decode("utf-8", "replace")}


def _canonical_json(value: Any) -> Any:
    """The value without what differs between two runs of one server: ids and times."""
    if isinstance(value, list):
        return [_canonical_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _canonical_field(key, item) for key, item in value.items()}


def _canonical_field(key: str, value: Any) -> Any:
    if key in _ID_KEYS and isinstance(value, str):
        return _RANDOM_ID.sub(lambda match: f"<{len(match[0])} random>", value)
    if key in _TIME_KEYS and isinstance(value, int | float):
        # Only what is a time now, in seconds: a zero or milliseconds would be a difference.
        return "<now>" if abs(value - time.time()) < _CLOCK_SLACK_S else value
    return _canonical_json(value)
