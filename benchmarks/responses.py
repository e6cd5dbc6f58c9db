"""Reads a server's answers from bytes, however they are cut: HTTP/1.1, chunked, SSE.

For the load generator, which shares the processor with the server that it measures. So nothing
is decoded, no JSON is parsed and no header is kept: an event is one token's if its text is not
empty, which one regular expression finds, and numbers are read only from the last event. A chunk
costs 2 µs here (`tests/test_bench_responses.py` holds any cut to the same result as the whole).
"""

from __future__ import annotations

import re

# A token's text in a chat chunk (or message) or in a completion chunk. The role chunk that opens a
# chat has an empty one, and it must not count: a server could send it before it has anything.
_TEXT = re.compile(rb'"(?:content|text)": ?"((?:[^"\\]|\\.)+)"')
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens": ?(\d+)')
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class ProtocolError(Exception):
    """The server sent something that is not an HTTP/1.1 answer this parser knows."""


class ResponseParser:
    """One connection's answers, one after another.

    Feed it bytes until `done`; then read the results and call `reset` before the next request.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Get ready for the next answer."""
        self.status = 0
        self.done = False
        self.events = 0  # events (or, unstreamed, answers) with text
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.text: list[bytes] = []  # as JSON has it, escapes included
        self.failure = ""
        self.must_close = False
        # Per-answer state
        self._sse = False
        self._chunked = False
        self._pending = b""  # of a header or of a chunk's size line
        self._left = 0  # of the HTTP chunk or body
        self._skip = 0  # of the line end after an HTTP chunk
        self._last = False
        self._body = b""  # of an event whose end has not come, or of a whole unstreamed answer

    def feed(self, data: bytes) -> int:
        """Take bytes as they arrived and return how many events with text they completed.

        Raises:
            ProtocolError: not an answer in HTTP/1.1 with a length or in chunks.
        """
        before = self.events
        if self._pending:
            data = self._pending + data
            self._pending = b""
        position = self._head(data) if self.status == 0 else 0
        end = len(data)
        while position < end and not self.done:
            if self._skip:
                step = min(self._skip, end - position)
                self._skip -= step
                position += step
                if self._last and not self._skip:
                    self._finish()
            elif self._left:
                piece = data[position : position + self._left]
                position += len(piece)
                self._left -= len(piece)
                self._take(piece)
            else:
                position = self._size_line(data, position)
        return self.events - before

    def _head(self, data: bytes) -> int:
        """Read the status and the headers; return where the body starts."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._pending = data
            return len(data)
        head = data[:end]
        if not head.startswith(b"HTTP/1.1 ") or not head[9:12].isdigit():
            raise ProtocolError(f"not an HTTP/1.1 answer: {head[:60]!r}")
        self.status = int(head[9:12])
        self.must_close = _CLOSE.search(head) is not None
        self._sse = b"text/event-stream" in head
        self._chunked = _CHUNKED.search(head) is not None
        if not self._chunked:
            length = _CONTENT_LENGTH.search(head)
            if length is None:
                raise ProtocolError("an answer with neither a length nor chunks")
            self._left = int(length[1])
            if not self._left:
                self._finish()
        return end + 4

    def _size_line(self, data: bytes, position: int) -> int:
        """Read the line that opens an HTTP chunk; return where the chunk starts."""
        end = data.find(b"\r\n", position)
        if end < 0:
            self._pending = data[position:]
            return len(data)
        try:
            self._left = int(data[position:end].split(b";")[0], 16)
        except ValueError:
            raise ProtocolError(f"not a chunk's size: {data[position:end][:60]!r}") from None
        if not self._left:
            self._last = True
            self._skip = 2
        return end + 2

    def _take(self, piece: bytes) -> None:
        """Take a piece of the body."""
        if not self._left and self._chunked:
            self._skip = 2
        if self._sse:
            if self._body:
                piece = self._body + piece
                self._body = b""
            if not piece.endswith(b"\n\n"):
                cut = piece.rfind(b"\n\n") + 2
                if cut < 2:
                    self._body = piece
                    return
                self._body = piece[cut:]
                piece = piece[:cut]
            self._read(piece)
        else:
            self._body += piece
        if not self._left and not self._chunked:
            self._finish()

    def _read(self, body: bytes) -> None:
        """Read whole events, or a whole unstreamed answer."""
        texts = _TEXT.findall(body)
        self.events += len(texts)
        self.text += texts
        if b'"usage"' in body:
            completion, prompt = _COMPLETION_TOKENS.search(body), _PROMPT_TOKENS.search(body)
            self.completion_tokens = int(completion[1]) if completion else 0
            self.prompt_tokens = int(prompt[1]) if prompt else 0
        elif b'"error"' in body and not texts:
            self.failure = body[:200].decode(errors="replace")

    def _finish(self) -> None:
        if not self._sse:
            self._read(self._body)
        if self.status != 200:
            detail = self._body[:200].decode(errors="replace")
            self.failure = f"HTTP {self.status}: {detail}"
        self.done = True
