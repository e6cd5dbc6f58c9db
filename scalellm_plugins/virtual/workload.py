"""Requests over time: from random processes, or from a trace. Pure, and reproducible by its seed.

Every tenant throws dice of its own, so that adding one changes nothing for the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import merge

from scalellm_plugins.errors import ConfigError

from . import lengths
from .job import Request
from .lengths import Lengths
from .tenants import Tenant
from .trace import Trace

MOST = 5_000_000
"""Requests; more would fill the memory before anything is simulated."""


@dataclass(frozen=True)
class Defaults:
    """What tenants that do not say otherwise send."""

    rate: float = 1.0
    """Requests per second of each."""
    cv: float = 1.0
    prompt: str = "512"
    output: str = "128"
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    deadline_ms: float | None = None


def synthetic(
    tenants: Sequence[Tenant], defaults: Defaults, seconds: float, seed: int
) -> list[Request]:
    """Return the requests that arrive in `seconds`, in order of time.

    The times between a tenant's requests are gamma distributed with its rate and its coefficient of
    variation, exponential (a Poisson process) where that is 1.

    Raises:
        ConfigError: lengths that are none, or no request at all.
    """
    expected = seconds * sum(tenant.rate or defaults.rate for tenant in tenants)
    if expected > MOST:
        raise ConfigError(
            f"--rate: about {expected:,.0f} requests in {seconds:g} s, more than {MOST:,}. Give "
            "less of either."
        )
    streams = [_stream(tenant, defaults, seconds, seed) for tenant in tenants]
    requests = list(merge(*streams, key=lambda request: request.at))
    if not requests:
        raise ConfigError(
            f"--seconds: no request arrives in {seconds:g} s at these rates. Give more of either."
        )
    return requests


def _stream(tenant: Tenant, defaults: Defaults, seconds: float, seed: int) -> list[Request]:
    dice = random.Random(f"{seed}/{tenant.name}")
    prompt, output = _lengths(tenant, defaults)
    make = _maker(tenant, defaults)
    shape = (tenant.cv or defaults.cv) ** -2
    scale = 1.0 / (shape * (tenant.rate or defaults.rate))
    end = min(seconds, tenant.until_s or seconds)
    at, found = tenant.from_s, []
    while (at := at + dice.gammavariate(shape, scale)) < end:
        found.append(make(at, prompt.draw(dice), output.draw(dice)))
    return found


def traced(trace: Trace, tenants: Sequence[Tenant], defaults: Defaults, seed: int) -> list[Request]:
    """Return a trace's requests, each given to one of the tenants, by chance and by their rates.

    Lengths that a tenant names itself replace the trace's.

    Raises:
        ConfigError: lengths that are none, or no request at all.
    """
    dice = random.Random(f"{seed}/trace")
    weights = [tenant.rate or 1.0 for tenant in tenants]
    makers = {tenant.name: _maker(tenant, defaults) for tenant in tenants}
    own = {tenant.name: _lengths(tenant, defaults) for tenant in tenants}
    found = []
    for row in trace.rows:
        (tenant,) = dice.choices(tenants, weights)
        prompt, output = row.prompt, row.output
        if tenant.prompt is not None:
            prompt = own[tenant.name][0].draw(dice)
        if tenant.output is not None:
            output = own[tenant.name][1].draw(dice)
        if tenant.from_s <= row.at < (tenant.until_s or row.at + 1):
            found.append(makers[tenant.name](row.at, prompt, output))
    if not found:
        raise ConfigError("--trace: no request is left within --seconds and the tenants' times")
    return found


def _lengths(tenant: Tenant, defaults: Defaults) -> tuple[Lengths, Lengths]:
    def one(value: str | int | None, default: str, side: lengths.Side) -> Lengths:
        if value is None:
            return lengths.parse(default, side, f"--{side}-tokens")
        return lengths.parse(str(value), side, f"--tenants: {tenant.name}: {side}")

    return (
        one(tenant.prompt, defaults.prompt, "prompt"),
        one(tenant.output, defaults.output, "output"),
    )


def _maker(tenant: Tenant, defaults: Defaults) -> Callable[[float, int, int], Request]:
    def make(at: float, prompt: int, output: int) -> Request:
        return Request(
            at=at,
            tenant=tenant.name,
            prompt=prompt,
            output=output,
            weight=tenant.weight,
            priority=tenant.priority,
            prefix=min(tenant.prefix, prompt),
            ttft_ms=tenant.ttft_ms or defaults.ttft_ms,
            tpot_ms=tenant.tpot_ms or defaults.tpot_ms,
            deadline_ms=tenant.deadline_ms or defaults.deadline_ms,
        )

    return make


def prompt_ids(number: int, request: Request) -> list[int]:
    """Token ids of the prompt of the workload's request `number`.

    Small ids, that every vocabulary has. After the prefix that the tenant's requests share comes
    the request's number, so that no two requests share a block of the prefix cache beyond that.
    """
    name = sum(ord(letter) * 31**place for place, letter in enumerate(request.tenant))
    ids = [*_digits(name), *[_FILLER] * request.prefix][: request.prefix]
    ids += _digits(number)[: request.prompt - len(ids)]
    return ids + [_FILLER] * (request.prompt - len(ids))


_FILLER, _BASE = 299, 300


def _digits(number: int) -> list[int]:
    return [_BASE + (number >> shift & 255) for shift in (0, 8, 16, 24)]
