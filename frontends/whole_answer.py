"""An answer in one piece: a JSON document, made and written when the last token is there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from .answers import Answer, ending_of
from .detokenize import escape
from .templates import TEXT
from .timing import server_timing

if TYPE_CHECKING:
    from .connection import FastLaneProtocol
    from .lane import Lane
    from .routes import Ask
    from .templates import Template


class WholeAnswer(Answer):
    """One JSON document at the end. Text is made once, when the last token is there."""

    __slots__ = ("body", "dropped", "template", "token_ids")

    def __init__(
        self, lane: Lane, connection: FastLaneProtocol, cycle: Any, ask: Ask, template: Template
    ) -> None:
        super().__init__(lane, connection, cycle, ask)
        self.template = template
        if not ask.body.stop:
            self.hold = 0
        self.token_ids: list[int] = []
        self.body: bytes | None = None
        self.dropped = False

    def admitted(self, request: Any, stats: Any) -> None:
        """As the base; stop strings are looked for as tokens come."""
        super().admitted(request, stats)
        if self.stop is not None:
            self.stream = self._token_stream()

    def advance(self, token_ids: list[int], *, stopped: bool) -> str | None:
        """See the base."""
        if self.stop is not None:
            matched = self.stop.push(self.stream, token_ids, stop_terminated=stopped)
            self.num_tokens = self.stop.num_tokens
            return matched
        self.token_ids += token_ids
        self.num_tokens = len(self.token_ids)
        self.dropped = stopped and not self.keep_stop
        return None

    def end(self, reason: str, stop_reason: int | str | None) -> None:
        """See the base."""
        if self.stop is not None:
            text = self.stop.text
        else:
            skip, spaces = self.special
            text = self.lane.detokenizer.text(
                self.prompt_ids,
                self.token_ids[:-1] if self.dropped else self.token_ids,
                skip_special_tokens=skip,
                spaces_between_special_tokens=spaces,
            )
        values = {**self._identity(), **self.counts(self.num_tokens)}
        values[TEXT] = escape(text)
        values |= ending_of(reason, stop_reason)
        self.body = self.template.render(values)
        self.over = True  # not before: should this fail, there is still an error to answer with

    def flush(self) -> None:
        """See the base."""
        self.waiting = False
        if self.body is not None and not self.paused and not self.cycle.disconnected:
            body, self.body = self.body, None
            self.clock.done = time.monotonic()
            self.stages = self.lane.stages_of(self)
            if self.stages is not None:
                self.extra_headers.append(server_timing(self.stages))
            self._respond(200, body)

    def fail(self, error: Exception) -> None:
        """See the base."""
        if self.over:
            return
        self.over = True
        if not self.cycle.disconnected:
            self._respond(*self._error(error))
