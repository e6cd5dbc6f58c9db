"""Terms: what a request says about its own scheduling, by what names, and what is valid.

Clients say them in the body, among vLLM's extra arguments, or in headers of our frontend::

    "vllm_xargs": {"scalellm_deadline_ms": 2000}        X-Scalellm-Deadline-Ms: 2000

Either way they reach the engine in `sampling_params.extra_args`, under the names of the body. Pure:
imports neither vLLM nor torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from scalellm_plugins.errors import TermError, closest_first

TENANT, WEIGHT = "scalellm_tenant", "scalellm_weight"
DEADLINE, TTFT, TPOT = "scalellm_deadline_ms", "scalellm_ttft_ms", "scalellm_tpot_ms"
SAID = (TENANT, WEIGHT, DEADLINE, TTFT, TPOT)
"""What a client may say. Times are milliseconds; a deadline counts from the request's arrival at
the frontend (`Request.arrival_time`, wall clock) to its last token."""

MAX_RUNNING, TOKENS_PER_MINUTE = "scalellm_max_running", "scalellm_tokens_per_minute"
KV_FLOOR, KV_CEILING = "scalellm_kv_floor", "scalellm_kv_ceiling"
"""A tenant's limits inside the engine, with those above. Only the frontend's tenants file says
them: the engine believes them."""

PREFIX = "scalellm_"
"""How all our names among the extra arguments begin. Whatever else does is a mistake."""

HEADERS = {
    b"x-scalellm-tenant": TENANT,
    b"x-scalellm-weight": WEIGHT,
    b"x-scalellm-deadline-ms": DEADLINE,
    b"x-scalellm-ttft-ms": TTFT,
    b"x-scalellm-tpot-ms": TPOT,
}
HEADER_PREFIX = b"x-scalellm-"

DEFAULT = "default"
"""The tenant of requests that name none."""

LONGEST_NAME = 256
LIGHTEST, HEAVIEST = 1e-6, 1e6
"""Weights. A lighter one could make a counter of service infinite, and with it every comparison."""
LONGEST_MS = 1e9
"""Eleven days: far beyond any use, and still exact in milliseconds as a float."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
"""Numbers in headers: as JSON and people write them, without `1_000` and the like."""

_NAME_WANTED = f"text of 1 to {LONGEST_NAME} printable characters"
_WEIGHT_WANTED = f"a number from {LIGHTEST:f} to {HEAVIEST:.0f}, such as 2 or 0.5"
_TIME_WANTED = f"milliseconds, a number above 0 and up to {LONGEST_MS:.0f}, such as 1500"


class Terms(msgspec.Struct, frozen=True):
    """What a request says, for the engine's side. Times in seconds; None: nothing was said."""

    tenant: str = DEFAULT
    weight: float | None = None
    ttft_s: float | None = None
    """From arrival to the first token."""
    tpot_s: float | None = None
    """For each token after the first, on average."""
    deadline_s: float | None = None
    """From arrival to the last token."""

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> Terms:
        """Read the terms among a request's extra arguments; any other is passed over.

        Raises:
            TermError: one of them is not valid.
        """
        if not extra_args:
            return _NONE
        given = {name: extra_args[name] for name in SAID if name in extra_args}
        if not given:
            return _NONE
        for name, value in given.items():
            check(name, value, name)
        times = {name: given[name] / 1e3 for name in (DEADLINE, TTFT, TPOT) if name in given}
        weight = given.get(WEIGHT)
        return cls(
            tenant=given.get(TENANT, DEFAULT),
            weight=None if weight is None else float(weight),
            ttft_s=times.get(TTFT),
            tpot_s=times.get(TPOT),
            deadline_s=times.get(DEADLINE),
        )


_NONE = Terms()


def in_body(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the terms among the extra arguments that a client sent.

    Raises:
        TermError: one is not valid, or has a name of ours that does not exist.
    """
    if not extra_args:
        return {}
    said = {name: value for name, value in extra_args.items() if name.startswith(PREFIX)}
    for name, value in said.items():
        field = f"vllm_xargs.{name}"
        if name not in SAID:
            raise _unknown(field, name, SAID)
        check(name, value, field)
    return said


def in_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, Any]:
    """Return the terms among a request's headers (names in lower case), by their names in bodies.

    Of several headers with one name the first counts, as everywhere in vLLM.

    Raises:
        TermError: as `in_body`.
    """
    said: dict[str, Any] = {}
    for header, raw in headers:
        if not header.startswith(HEADER_PREFIX):
            continue
        name = HEADERS.get(header)
        field = _titled(header)
        if name is None:
            raise _unknown(field, field, map(_titled, HEADERS))
        if name not in said:
            said[name] = _header_value(name, raw, field)
    return said


def _header_value(name: str, raw: bytes, field: str) -> Any:
    try:
        text = raw.decode()  # so that a name is the same in a header and in a body
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    value: Any = text.strip()
    if name != TENANT and _NUMBER.fullmatch(value):
        value = float(value)
    check(name, value, field, shown=text)
    return value


def check(name: str, value: Any, field: str, *, shown: Any = None) -> None:
    """Look at one term: `field` is where it was said, `shown` how, if not as `value`.

    Raises:
        TermError: it is not valid.
    """
    wanted = _wrong(name, value)
    if wanted is not None:
        said = _short(value if shown is None else shown)
        raise TermError(f"{field}: {said} is not valid. Valid: {wanted}", field)


def _wrong(name: str, value: Any) -> str | None:
    """Return what would be valid, None where `value` is."""
    if name == TENANT:
        # What is printable can be encoded, too: half a surrogate pair is not.
        known = isinstance(value, str) and len(value) <= LONGEST_NAME
        return None if known and value.strip() and value.isprintable() else _NAME_WANTED
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == WEIGHT:
        return None if number and LIGHTEST <= value <= HEAVIEST else _WEIGHT_WANTED
    return None if number and 0 < value <= LONGEST_MS else _TIME_WANTED


def _unknown(field: str, name: str, known: Iterable[str]) -> TermError:
    valid = ", ".join(closest_first(name, known))
    return TermError(f"{field}: there is no such name. Valid: {valid}", field)


def _titled(header: bytes) -> str:
    """Write a header's name as it is documented."""
    words = header.decode("latin-1").split("-")
    return "-".join(word.upper() if word in ("ttft", "tpot") else word.title() for word in words)


def _short(value: Any) -> str:
    """Show a value that somebody sent, at a bounded length."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a whole number of more than 20 digits"  # Python refuses to write very long ones
    text = repr(value[:64] if isinstance(value, str | list) else value)
    return text if len(text) <= 80 else f"{text[:80]}…"
