"""Requests that the engine refuses or gives up: how it says so to the frontend.

Such a request ends with an output whose `finish_reason` is ERROR and whose `stop_reason` says what
its client shall be told: `scalellm:504:The deadline …`. vLLM's own outputs have room for no more,
and its own frontend (which does not read this) answers 500 to any ERROR. Pure.
"""

from __future__ import annotations

import re
from http import HTTPStatus

import msgspec

_STATUSES = frozenset(status.value for status in HTTPStatus if status >= 400)
_FORM = re.compile(r"scalellm:(\d{3})(?:;(\d{1,6}))?:(.*)", re.ASCII | re.DOTALL)


class Refused(msgspec.Struct, frozen=True):
    """What a client is told. `status` is HTTP's: 504 for a deadline, 429 for a tenant's quota."""

    status: int
    message: str
    retry_after_s: int | None = None
    """In how many whole seconds it may be worth trying again, where that is known."""

    def reason(self) -> str:
        """Return it as a `stop_reason`: `scalellm:STATUS:MESSAGE`, or `scalellm:STATUS;S:…`."""
        seconds = "" if self.retry_after_s is None else f";{self.retry_after_s}"
        return f"scalellm:{self.status}{seconds}:{self.message}"

    @classmethod
    def of(cls, stop_reason: object) -> Refused | None:
        """Read a `stop_reason`; None where it is any other (a stop string, a token's id, none)."""
        found = _FORM.fullmatch(stop_reason) if isinstance(stop_reason, str) else None
        if found is None or int(found[1]) not in _STATUSES:
            return None
        return cls(int(found[1]), found[3], None if found[2] is None else int(found[2]))
