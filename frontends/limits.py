"""Limits on what a server, or one tenant of it, may have in flight; and what the refused are told.

Four things are limited, alike for the server and for each tenant: requests and their prompt
tokens, both in flight (admitted, not answered yet) and queued (no first token yet). Pure: imports
neither vLLM nor torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated

import msgspec
from msgspec import Meta

REQUESTS, QUEUED_REQUESTS, PROMPT_TOKENS, QUEUED_PROMPT_TOKENS = range(4)
GAUGES = ("requests", "queued_requests", "prompt_tokens", "queued_prompt_tokens")
"""What is counted, in the order of the constants above; a limit's name has `max_` before it."""

_SAID = (
    "requests in flight",
    "requests that wait for their first token",
    "prompt tokens in flight",
    "prompt tokens that wait for their first token",
)
SHORTEST_RETRY_S, LONGEST_RETRY_S = 1, 60
_SMOOTHING_S = 20.0
"""Time constant of the drain rate: it follows a change by two thirds in this time. Answers may take
as long, and in a shorter window none may have ended."""

Limit = Annotated[int, Meta(ge=1)] | None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """At most so many; None: as many as come."""

    max_requests: Limit = None
    max_queued_requests: Limit = None
    max_prompt_tokens: Limit = None
    max_queued_prompt_tokens: Limit = None

    def by_gauge(self) -> tuple[int | None, ...]:
        """Return the limits in the order of `GAUGES`."""
        return tuple(getattr(self, f"max_{name}") for name in GAUGES)


UNLIMITED = Limits()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not admitted. `tenant`: whose limit it is; None: the server's.

    `used` of `limit` are taken (of the gauge with the number `gauge`), `added` would come to it.
    """

    tenant: str | None
    gauge: int
    limit: int
    used: int
    added: int

    @property
    def status(self) -> int:
        """429 for what a tenant may change by itself, 503 for what no client can."""
        return 503 if self.tenant is None else 429

    @property
    def option(self) -> str:
        """The limit's name."""
        return f"max_{GAUGES[self.gauge]}"

    def retry_after(self, rate: float | None) -> int:
        """Return after how many seconds there is room, if `rate` per second leave (None: unknown).

        Between 1 and 60: less is no whole second, and nobody plans further than that.
        """
        if rate is None:
            return SHORTEST_RETRY_S
        need = max(1, self.used + self.added - self.limit)
        if need >= rate * LONGEST_RETRY_S:
            return LONGEST_RETRY_S
        return max(SHORTEST_RETRY_S, math.ceil(need / rate))

    def message(self, retry_after: int) -> str:
        """Say which limit it was, how large it is and where it is set."""
        taken = f"{self.used} {_SAID[self.gauge]}"
        if self.gauge >= PROMPT_TOKENS and self.added > 1:
            taken += f", this request brings {self.added}"
        if self.tenant is None:
            return (
                f"The server has {taken}, and its limit is {self.limit} "
                f"(--scalellm.frontend.{self.option}). Retry in {retry_after} s."
            )
        return (
            f"The tenant {self.tenant!r} has {taken}, and its limit is {self.limit} "
            f"({self.option} in the tenants file). Retry in {retry_after} s."
        )

    def body(self, retry_after: int, *, anthropic: bool = False) -> bytes:
        """Return the error document: OpenAI's as vLLM writes it, or Anthropic's."""
        return error_body(self.status, self.message(retry_after), anthropic=anthropic)


_ANTHROPIC_KINDS = {429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}


def error_body(status: int, text: str, *, anthropic: bool = False) -> bytes:
    """Return an error document: OpenAI's as vLLM writes it, or Anthropic's."""
    if anthropic:
        kind = _ANTHROPIC_KINDS.get(status, "api_error")
        return json.dumps({"type": "error", "error": {"type": kind, "message": text}}).encode()
    error = {
        "message": text,
        "type": HTTPStatus(status).phrase,
        "param": None,
        "code": status,
    }
    return json.dumps({"error": error}, ensure_ascii=False, separators=(",", ":")).encode()


class DrainRate:
    """How many per second leave, of each gauge: a moving average over the time there was load."""

    __slots__ = ("_at", "_left", "_loaded_s", "_recent")

    def __init__(self, now: float, left: Iterable[int]) -> None:
        self._at = now
        self._left = tuple(left)
        self._recent = [0.0] * len(GAUGES)
        self._loaded_s = [0.0] * len(GAUGES)
        """Both fade alike, so their quotient is right from the first departure on."""

    def sample(self, now: float, left: Sequence[int], used: Sequence[int]) -> None:
        """Take a look at `now` (s): `left` so far in total, `used` at the moment.

        A gauge that nothing left and in which nothing is says nothing about how fast it drains:
        its rate stays as it was.
        """
        elapsed = now - self._at
        if elapsed <= 0:
            return
        fade = math.exp(-elapsed / _SMOOTHING_S)
        for gauge, (before, after) in enumerate(zip(self._left, left, strict=True)):
            if after != before or used[gauge]:
                self._recent[gauge] = self._recent[gauge] * fade + after - before
                self._loaded_s[gauge] = self._loaded_s[gauge] * fade + elapsed
        self._at, self._left = now, tuple(left)

    def rate(self, gauge: int) -> float | None:
        """Return how many per second leave, None while none has."""
        return self._recent[gauge] / self._loaded_s[gauge] if self._recent[gauge] else None
