"""The load generator's parser: the same result however the bytes are cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.benchmarks.responses import ProtocolError, ResponseParser

HEAD = b"HTTP/1.1 200 OK\r\ndate: x\r\ncontent-type: text/event-stream; charset=utf-8\r\n"


def event(data: object) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


def delta(**fields: str) -> dict[str, object]:
    return {"id": "x", "choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def chunked(pieces: list[bytes]) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return HEAD + b"transfer-encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def answer(texts: list[str], per_chunk: int = 1) -> bytes:
    """A streamed chat answer in vLLM's form, `per_chunk` events in each HTTP chunk."""
    events = [event(delta(role="assistant", content=""))]
    events += [event(delta(content=text)) for text in texts]
    usage = {"prompt_tokens": 7, "total_tokens": 9, "completion_tokens": len(texts)}
    events += [event({"choices": [], "usage": usage}), event("[DONE]")]
    groups = [events[i : i + per_chunk] for i in range(0, len(events), per_chunk)]
    return chunked([b"".join(group) for group in groups])


def parse(data: bytes, cuts: list[int] | None = None) -> tuple[ResponseParser, int]:
    parser = ResponseParser()
    edges = [0, *sorted(cuts or []), len(data)]
    counted = sum(parser.feed(data[a:b]) for a, b in pairwise(edges) if a < b)
    return parser, counted


texts = st.lists(st.text(min_size=1, max_size=6), max_size=12)


@given(texts, st.integers(1, 4), st.data())
def test_any_cut_gives_the_same_as_the_whole(
    words: list[str], per_chunk: int, data: st.DataObject
) -> None:
    whole = answer(words, per_chunk)
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=20))
    parser, counted = parse(whole, cuts)
    assert parser.done
    assert counted == parser.events == parser.completion_tokens == len(words)
    assert parser.prompt_tokens == 7
    assert not parser.failure
    assert json.loads(b'"' + b"".join(parser.text) + b'"') == "".join(words)


def test_every_byte_by_itself() -> None:
    whole = answer(["a", "\n\n", '"content":"x"', "\\"])
    parser, counted = parse(whole, list(range(len(whole))))
    assert (parser.done, counted) == (True, 4)


def test_role_and_finish_chunks_are_no_tokens() -> None:
    finish = {"choices": [{"delta": {}, "finish_reason": "length"}]}
    whole = chunked([event(delta(role="assistant", content="")), event(finish), event("[DONE]")])
    parser, counted = parse(whole)
    assert (parser.done, counted, parser.completion_tokens) == (True, 0, 0)


def test_spaces_in_json_and_completions() -> None:
    whole = chunked([event('{"choices": [{"text": " hi"}]}'), event("[DONE]")])
    parser, counted = parse(whole)
    assert counted == 1
    assert parser.text == [b" hi"]


@given(st.lists(st.integers(0, 250), max_size=10))
def test_unstreamed_answer(cuts: list[int]) -> None:
    body = json.dumps(
        {
            "choices": [{"message": {"role": "assistant", "content": "hello \u00e9"}}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": None},
        }
    ).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    whole = head % len(body) + body
    parser, counted = parse(whole, [min(cut, len(whole)) for cut in cuts])
    assert (parser.done, counted, parser.completion_tokens) == (True, 1, 2)
    assert b"".join(parser.text) == b"hello \\u00e9"


def test_errors_are_told() -> None:
    body = b'{"error":{"message":"boom"}}'
    parser, _ = parse(b"HTTP/1.1 500 Oops\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    assert parser.done
    assert parser.failure.startswith("HTTP 500: ")
    assert "boom" in parser.failure

    parser, _ = parse(chunked([event(delta(content="a")), event('{"error":{"message":"late"}}')]))
    assert "late" in parser.failure


def test_next_answer_on_the_same_connection() -> None:
    parser, _ = parse(answer(["a", "b"]))
    parser.reset()
    assert parser.feed(answer(["c"])) == 1
    assert parser.done
    assert parser.text == [b"c"]


def test_empty_body_and_close() -> None:
    parser, _ = parse(b"HTTP/1.1 503 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    assert parser.done
    assert parser.must_close
    assert parser.failure.startswith("HTTP 503")


@pytest.mark.parametrize(
    "data",
    [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nbody", chunked([])[:-5] + b"zz\r\n"],
)
def test_what_is_not_an_answer(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        ResponseParser().feed(data)
