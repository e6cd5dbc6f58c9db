"""A request in the fast lane, from the engine's first output to the last byte.

An `Answer` stands in vLLM's `OutputProcessor.request_states` among vLLM's own: so counting,
admission, aborts and errors of vLLM reach it like any other (`put`, `make_request_output`, and the
attributes that vLLM's functions read). What it does not have is a queue and a task: outputs are
pushed through it within the engine's step, and bytes leave in the same turn of the event loop.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

from .detokenize import escape
from .engine_refusals import headers_wait, refused_by, retry_headers
from .stops import StopText
from .templates import (
    CACHED,
    COMPLETION,
    CREATED,
    FINISH,
    ID,
    PROMPT,
    STOP,
    STORED,
    TEXT,
    TOTAL,
)
from .timing import Clock

if TYPE_CHECKING:
    from .connection import FastLaneProtocol
    from .detokenize import TokenStream
    from .lane import Lane
    from .routes import Ask
    from .templates import StreamTemplates

_plain = re.compile(r"[\w.-]+", re.ASCII).fullmatch
"""Whether a text is the same within JSON."""

_LAST_CHUNK = b"0\r\n\r\n"


class Answer:
    """What both kinds share. Sub-classes define `advance`, `end` and `flush`.

    Slots, and what a streamed token needs first: a dictionary of this many attributes is three
    lines of cache for each look-up, and between two steps other processes have had the cache.
    """

    __slots__ = (
        *("num_tokens", "last", "fresh", "waiting", "paused", "over", "connection", "cycle"),
        *("lane", "ask", "clock", "hold", "length", "extra_headers", "stats"),
        *("queue", "request_id", "external_req_id", "prompt_ids", "prompt_len"),
        *("max_tokens_param", "is_prefilling", "num_cached_tokens", "num_cache_creation_tokens"),
        *("stages", "keep_stop", "special", "stop", "stream"),
        "__dict__",  # for whatever a release of vLLM may put there
    )

    # Constants where vLLM's RequestState has variables.
    parent_req = None
    lora_name = None
    streaming_input = False
    detokenizer = None

    def __init__(self, lane: Lane, connection: FastLaneProtocol, cycle: Any, ask: Ask) -> None:
        self.lane = lane
        self.connection = connection
        self.cycle = cycle
        self.ask = ask
        self.clock = Clock()
        # The answer before it on this connection may not have been read yet.
        self.paused = bool(getattr(getattr(connection, "flow", None), "write_paused", False))
        self.waiting = False
        """Whether the lane will call `flush` at the end of this turn."""
        self.over = False
        """No more outputs are expected: finished, failed, aborted or left alone."""
        self.num_tokens = 0
        self.hold: int | None = None
        """Tokens that the engine is asked to send together; 0: all of them."""
        self.length: int | None = None
        """Bytes of the body, where they were announced."""
        self.extra_headers: list[bytes] = []
        self.stages: dict[str, float] | None = None
        """Seconds by stage, where the client was told."""
        # What vLLM's functions read.
        self.queue = self
        self.request_id = ""
        self.external_req_id = ""
        self.prompt_len = 0
        self.max_tokens_param: int | None = None
        self.is_prefilling = True
        self.num_cached_tokens = 0
        self.num_cache_creation_tokens = 0
        self.stats: Any = None
        # Of tokens that came as columns; `catch_up` tells `stats`.
        self.last = 0.0
        """Time of the last token, as the engine's clock has it."""
        self.fresh = 0
        """Tokens that `stats` does not know of."""

    def catch_up(self) -> None:
        """Tell `stats` about the tokens that came as columns."""
        known = self.stats
        if known is not None:
            known.num_generation_tokens += self.fresh
            known.last_token_ts = self.last
        self.fresh = 0

    def admitted(self, request: Any, stats: Any) -> None:
        """Take over what vLLM made of the request (an `EngineCoreRequest`)."""
        self.request_id = request.request_id
        self.external_req_id = request.external_req_id
        self.prompt_ids = request.prompt_token_ids
        self.prompt_len = len(self.prompt_ids)
        params = request.sampling_params
        self.max_tokens_param = params.max_tokens
        self.stats = stats
        self.keep_stop = params.include_stop_str_in_output
        self.special = (params.skip_special_tokens, params.spaces_between_special_tokens)
        self.stop: StopText | None = None
        if params.stop:
            self.stop = StopText(
                params.stop, include_stop=self.keep_stop, min_tokens=params.min_tokens
            )

    # Called by vLLM's OutputProcessor

    def make_request_output(self, *_args: Any, **_kwargs: Any) -> Answer:
        """vLLM makes the last output of a request that it aborts; ours is the answer itself."""
        return self

    def put(self, output: Any) -> None:
        """The end, from outside: vLLM aborted the request, or the engine failed."""
        if isinstance(output, Exception):
            self.fail(output)
        elif not self.over:
            self.end("abort", None)
            self.flush()

    # Called by the lane

    def advance(self, token_ids: list[int], *, stopped: bool) -> str | None:
        """Take a step's tokens; return the stop string that they complete, if any.

        `stopped`: the last token ended the request and its text does not count.
        """
        raise NotImplementedError

    def push(self, token_id: int) -> str | None:
        """Take one token that does not end the request: `advance`, as often as there are tokens."""
        return self.advance([token_id], stopped=False)

    def show(self, token_id: int) -> bool:  # noqa: ARG002
        """Take one token and write it; False, and nothing has happened, where `push` must."""
        return False

    def end(self, reason: str, stop_reason: int | str | None) -> None:
        """Note how it ended; the next `flush` writes it."""
        raise NotImplementedError

    def flush(self) -> None:
        """Write what there is to write, unless the client cannot take it now."""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """The request cannot go on."""
        raise NotImplementedError

    def gone(self) -> None:
        """The client went away."""
        if not self.over:
            self.over = True
            self.lane.abort(self)
        self.lane.closed(self, 499)

    def counts(self, tokens: int) -> dict[str, bytes]:
        """Token counts, for templates."""
        return {
            PROMPT: b"%d" % self.prompt_len,
            COMPLETION: b"%d" % tokens,
            TOTAL: b"%d" % (self.prompt_len + tokens),
            CACHED: b"%d" % self.num_cached_tokens,
            STORED: b"%d" % self.num_cache_creation_tokens,
        }

    def _respond(self, status: int, body: bytes) -> None:
        """Answer with one document."""
        self.length = len(body)
        lines = self.lane.start(self, status, b"application/json", body)
        self.connection.write(lines + body)
        self.lane.closed(self, status)
        self.connection.finish(self.cycle)

    def _error(self, error: Exception) -> tuple[int, bytes]:
        refused = refused_by(error)
        if refused is not None:
            self.extra_headers += [b"%b: %b\r\n" % pair for pair in retry_headers(refused)]
        return self.ask.route.error(error)

    def _token_stream(self) -> TokenStream:
        skip, spaces = self.special
        return self.lane.detokenizer.stream(
            self.prompt_ids, skip_special_tokens=skip, spaces_between_special_tokens=spaces
        )

    def _identity(self) -> dict[str, bytes]:
        name = self.ask.request_id
        if not _plain(name):
            name = json.dumps(name, ensure_ascii=False)[1:-1]
        return {ID: name.encode("utf-8", "surrogatepass"), CREATED: b"%d" % self.ask.created}


def ending_of(reason: str, stop_reason: int | str | None) -> dict[str, bytes]:
    """How a request ended, for templates."""
    stop = b"null" if stop_reason is None else json.dumps(stop_reason, ensure_ascii=False).encode()
    return {FINISH: b'"%b"' % reason.encode(), STOP: stop}  # one of vLLM's own words


class StreamedAnswer(Answer):
    """Server-sent events, one per step unless the client or this worker is slower."""

    __slots__ = (
        *("ready", "fixed", "head", "tail", "text", "due", "begun", "interval", "ending"),
        *("templates", "turn", "tokens_shown", "headless", "head_timer", "_bound"),
    )

    def __init__(
        self,
        lane: Lane,
        connection: FastLaneProtocol,
        cycle: Any,
        ask: Ask,
        templates: StreamTemplates,
        interval: int,
    ) -> None:
        super().__init__(lane, connection, cycle, ask)
        self.templates = templates
        self.interval = interval
        if interval > 1 and not ask.body.stop:
            self.hold = interval
        self.due = True
        """Whether text may be written: always, or once in an interval."""
        self.turn = 0
        """Tokens at the last turn of the interval. Moved when tokens arrive, whatever is written
        then, so that it stays in step with the engine, which counts in the same way."""
        self.tokens_shown = 0
        """Tokens at the last event that carried counts."""
        self.text = b""
        """Escaped text that was not written yet."""
        self.begun = False
        self.ending: tuple[str, int | str | None] | None = None
        self.stream: TokenStream | None = None
        self.headless = False
        """Whether the headers are still to be sent. The status is 200, unless the engine refuses
        the request before that."""
        self.head_timer: asyncio.TimerHandle | None = None
        self.ready: list[bytes | None] | None = None
        """A token's bytes by its id, while there is nothing to a token but that (see `show`)."""

    def send_headers(self) -> None:
        """Send the headers if they are still here."""
        if self.headless and not self.cycle.disconnected:
            self.connection.write(self._head())

    def _head(self) -> bytes:
        """Return what of the headers is still to be sent."""
        if not self.headless:
            return b""
        self._with_head()
        return self.lane.start(self, 200, b"text/event-stream; charset=utf-8", None)

    def _with_head(self) -> None:
        self.headless = False
        if self.head_timer is not None:
            self.head_timer.cancel()

    def admitted(self, request: Any, stats: Any) -> None:
        """As the base.

        The headers leave with the first token: one write and one wake-up of the client less. Where
        that takes long, they go ahead (`send_headers`).
        """
        super().admitted(request, stats)
        self.stream = self._token_stream()
        identity = self._identity()
        self._bound = identity
        if not self.templates.counts:
            self.head, self.tail = self.templates.delta.bind(identity).around(TEXT)
            self.fixed = len(self.head) + len(self.tail)
        self.headless = True
        self.lane.hold_back(self, headers_wait(request.sampling_params.extra_args))

    def advance(self, token_ids: list[int], *, stopped: bool) -> str | None:
        """See the base."""
        self.ready = None
        self.num_tokens += len(token_ids)
        if self.interval > 1:
            self._take_turn()
        stream = self.stream
        assert stream is not None
        if self.stop is not None:
            matched = self.stop.push(stream, token_ids, stop_terminated=stopped)
            self.num_tokens = self.stop.num_tokens
            if matched is None and not stopped:
                self._add(self.stop.delta(finished=False))
            return matched
        if stopped and not self.keep_stop:
            token_ids = token_ids[:-1]
        for token_id in token_ids:
            self.text += stream.feed_json(token_id)
        return None

    def push(self, token_id: int) -> str | None:
        """See the base."""
        if self.stop is not None or self.interval > 1:
            return self.advance([token_id], stopped=False)
        self.ready = None
        self.num_tokens += 1
        self.text += self.stream.feed_json(token_id)  # type: ignore[union-attr]
        return None

    def show(self, token_id: int) -> bool:
        """See the base. The steady state of a stream: nothing waits, and the client reads."""
        ready = self.ready
        if ready is None or self.waiting or self.paused or not 0 <= token_id < len(ready):
            return False
        text = ready[token_id]
        if text is None:
            return False
        self.num_tokens += 1
        if text:
            self.connection.write(
                b"%x\r\n%b%b%b\r\n" % (self.fixed + len(text), self.head, text, self.tail)
            )
        return True

    def _take_turn(self) -> None:
        # vLLM's --stream-interval: the first token, then every so many (and the last).
        if not self.turn or self.num_tokens - self.turn >= self.interval:
            self.turn = self.num_tokens
            self.due = True

    def _add(self, text: str) -> None:
        if text:
            self.text += escape(text)

    def end(self, reason: str, stop_reason: int | str | None) -> None:
        """See the base."""
        self.ready = None
        if self.stop is not None:
            self._add(self.stop.delta(finished=True))
        self.over = True
        self.ending = (reason, stop_reason)

    def flush(self) -> None:
        """See the base."""
        self.waiting = False
        if self.paused or self.cycle.disconnected or (self.over and self.ending is None):
            return  # not now, or nothing more: it has ended
        if self.begun and self.ending is None and not self.templates.counts:
            if self.text and self.due:
                text, self.text = self.text, b""
                self.due = self.interval <= 1
                self.connection.write(
                    b"%x\r\n%b%b%b\r\n" % (self.fixed + len(text), self.head, text, self.tail)
                )
            if self.stop is None and self.interval <= 1:
                self.ready = self.stream.table  # type: ignore[union-attr]
            return
        self._flush_rarely()

    def _flush_rarely(self) -> None:
        """The first events, the last ones, and those that carry counts."""
        if self.ending is None and (self.is_prefilling or (self.begun and not self.due)):
            return
        events = []
        if not self.begun:
            events.append(self.templates.first.render({**self._bound, **self.counts(0)}))
        text, self.text = self.text, b""
        fresh = self.num_tokens > self.tokens_shown
        self.tokens_shown = self.num_tokens
        values = {**self._bound, **self.counts(self.num_tokens), TEXT: text}
        if self.ending is None:
            if text or (fresh and self.templates.counts):
                events.append(self.templates.delta.render(values))
            # Begun is what has written something: the headers are still here until then.
            self.begun = self.begun or any(events)
            self.due = self.interval <= 1 or not any(events)
            self._write(events)
            return
        values |= ending_of(*self.ending)
        if self.num_tokens:  # vLLM leaves it out of a stream that was ended before its first token
            events.append(self.templates.finish.render(values))
        if self.templates.usage is not None:
            events.append(self.templates.usage.render(values))
        self._close([*events, self.templates.done])

    def _write(self, events: list[bytes], closing: bytes = b"") -> None:
        body = b"".join(events)
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        if chunk or closing:
            self.connection.write(self._head() + chunk + closing)

    def _close(self, events: list[bytes]) -> None:
        self.ending = None
        self._write(events, _LAST_CHUNK)
        self.lane.closed(self, 200)
        self.connection.finish(self.cycle)

    def gone(self) -> None:
        """See the base."""
        self.ready = None
        super().gone()

    def fail(self, error: Exception) -> None:
        """The status is out: the error is an event, as in vLLM. If not, a refusal has its own."""
        self.ready = None
        if self.over:
            return
        self.over = True
        if self.cycle.disconnected:
            return
        refused = refused_by(error)
        if refused is not None and self.headless:
            self._with_head()
            self._respond(*self._error(error))
            return
        events = [self.ask.route.stream_error(error), self.templates.done]
        if not (self.begun or self.is_prefilling or refused is not None):
            # The engine's first output says so: vLLM begins the stream before it looks at that.
            events.insert(0, self.templates.first.render({**self._bound, **self.counts(0)}))
        self._close(events)
