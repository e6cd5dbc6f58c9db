"""What the differential suite may overlook, and what it must not: no server needed."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .differential_client import Exchange, Response
from .differential_compare import canonical, differences
from .differential_streams import canonical_stream

TEXT = 'The capital 😀 "of" France'


def _chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    choice |= {"stop_reason": None} if finish else {}
    base = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1}
    return base | {"model": "demo", "choices": [choice], **more}


def _chunks(cuts: list[int]) -> list[dict[str, Any]]:
    """A chat stream of TEXT, cut at these places; what follows the last cut ends it."""
    edges = [0, *sorted(cuts), len(TEXT)]
    pieces = [TEXT[a:b] for a, b in pairwise(edges)]
    return [
        _chunk({"role": "assistant", "content": ""}),
        *(_chunk({"content": piece}) for piece in pieces[:-1]),
        _chunk({"content": pieces[-1]}, "stop"),
        _chunk({}) | {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}},
    ]


def _sse(chunks: list[dict[str, Any]], end: str = "data: [DONE]\n\n") -> bytes:
    return ("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end).encode()


def _compare(a: bytes, b: bytes) -> list[str]:
    return differences(canonical_stream(a), canonical_stream(b))


CUTS = st.lists(st.integers(0, len(TEXT)), max_size=8)


@given(CUTS, CUTS)
def test_where_a_stream_is_cut_makes_no_difference(a: list[int], b: list[int]) -> None:
    assert _compare(_sse(_chunks(a)), _sse(_chunks(b))) == []


def _broken(chunks: list[dict[str, Any]]) -> dict[str, bytes]:
    """Streams that each differ from the given one in one thing that a client could notice."""
    role, first, *rest = chunks
    *contents, finish, usage = rest
    dropped = json.loads(json.dumps(first))
    del dropped["choices"][0]["logprobs"]
    stopped = json.loads(json.dumps(finish))
    stopped["choices"][0] |= {"finish_reason": "length"}
    return {
        "no role": _sse(chunks[1:]),
        "role twice": _sse([role, *chunks]),
        "role with content": _sse([_chunk({"role": "assistant", "content": "x"}), *chunks[1:]]),
        "a key less": _sse([role, dropped, *rest]),
        "a key more": _sse([role, first | {"extra": None}, *rest]),
        "text lost": _sse([role, *rest]),
        "another reason": _sse([role, first, *contents, stopped, usage]),
        "no finish": _sse([role, first, *contents, usage]),
        "finish twice": _sse([role, first, *contents, finish, finish, usage]),
        "content after finish": _sse([*chunks[:-1], _chunk({"content": ""}), usage]),
        "usage first": _sse([usage, *chunks[:-1]]),
        "no usage": _sse(chunks[:-1]),
        "another count": _sse([*chunks[:-1], usage | {"usage": {"prompt_tokens": 4}}]),
        "another id": _sse([role, first | {"id": "chatcmpl-1123456789abcdef"}, *rest]),
        "tool call": _sse([role, first, _chunk({"tool_calls": [{"index": 0}]}), *rest]),
        "not done": _sse(chunks, end=""),
        "done twice": _sse(chunks, end="data: [DONE]\n\ndata: [DONE]\n\n"),
        "no last blank line": _sse(chunks, end="data: [DONE]\n"),
        "comment": _sse(chunks, end=": ping\n\ndata: [DONE]\n\n"),
    }


@pytest.mark.parametrize("name", _broken(_chunks([4, 9])))
def test_a_broken_stream_differs(name: str) -> None:
    chunks = _chunks([4, 9])
    assert _compare(_sse(chunks), _broken(chunks)[name])


def test_token_ids_and_logprobs_are_joined_over_chunks() -> None:
    """Two tokens in one chunk say the same as one in each of two; another token does not."""

    def stream(*groups: list[int]) -> bytes:
        chunks = _chunks([1] * (len(groups) - 1))
        for chunk, ids in zip(chunks[1:], groups, strict=False):
            logprobs = {"content": [{"token": str(i), "logprob": -float(i)} for i in ids]}
            chunk["choices"][0] |= {"token_ids": ids, "logprobs": logprobs}
        return _sse(chunks)

    assert _compare(stream([1, 2], [3]), stream([1], [2], [3])) == []
    found = _compare(stream([1, 2], [3]), stream([1], [2], [4]))
    assert [line.partition(":")[0].rpartition(".")[2] for line in found] == [
        "token_ids[2]",
        "token",
        "logprob",
    ]


def _response(**changes: Any) -> Response:
    fields: dict[str, Any] = {
        "version": "HTTP/1.1",
        "status": 200,
        "reason": "OK",
        "headers": (("content-type", "application/json"), ("date", "now"), ("vary", "Origin")),
        "body": b'{"id": "cmpl-0123456789abcdef", "n": 1, "ok": true, "p": -0.5}',
        "framing": "length",
    }
    return Response(**{**fields, **changes})


def _found(*responses: Response, connection: str = "open") -> list[str]:
    one = canonical(Exchange((_response(),), "open"))
    return differences(one, canonical(Exchange(responses, connection)))


def test_ids_dates_and_spelling_of_json_make_no_difference() -> None:
    body = b'{"n":1,"ok":true,"p":-0.50000001,\n"id":"cmpl-fedcba9876543210"}'
    date = (("vary", "Origin"), ("content-type", "application/json"), ("date", "then"))
    assert _found(_response(body=body, headers=date)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"status": 201},
        {"reason": "Fine"},
        {"version": "HTTP/1.0"},
        {"framing": "chunked"},
        {"interim": (100,)},
        {"headers": (("content-type", "application/json"), ("date", "now"))},
        {"body": b'{"id": "cmpl-0123456789abcdef", "n": 1, "ok": 1, "p": -0.5}'},
        {"body": b'{"id": "cmpl-0123456789abcde", "n": 1, "ok": true, "p": -0.5}'},
        {"body": b'{"id": "my-own-id", "n": 1, "ok": true, "p": -0.5}'},
        {"body": b'{"id": "cmpl-0123456789abcdef", "n": 1, "ok": true, "p": -0.501}'},
        {"body": b'{"id": "cmpl-0123456789abcdef", "n": 1, "ok": true, "p": -0.5, "q": null}'},
        {"body": b"{"},
    ],
    ids=str,
)
def test_anything_else_differs(changes: dict[str, Any]) -> None:
    assert _found(_response(**changes))


def test_a_missing_response_and_a_closed_connection_differ() -> None:
    assert _found()
    assert _found(_response(), _response())
    assert len(_found(_response(), connection="closed")) == 1
