"""What one tenant may have of an engine, as its requests bring it. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from .terms import KV_CEILING, KV_FLOOR, MAX_RUNNING, TOKENS_PER_MINUTE


class TenantLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one tenant may have; what is None is not limited."""

    max_running: int | None = None
    """Sequences at a time."""
    floor: float = 0.0
    """Share of the KV blocks that is there for it."""
    ceiling: float | None = None
    """Share of the KV blocks that it may have."""
    tokens_per_minute: int | None = None

    @classmethod
    def of(cls, extra: Mapping[str, Any] | None) -> TenantLimits:
        """Read the limits out of a request's extra arguments; what makes no sense is no limit."""
        if not extra:
            return NONE
        running, rate = _number(extra, MAX_RUNNING, 1), _number(extra, TOKENS_PER_MINUTE, 1)
        floor, ceiling = _number(extra, KV_FLOOR, 0, 1), _number(extra, KV_CEILING, 0, 1)
        if running is rate is floor is ceiling is None:
            return NONE
        return cls(
            max_running=None if running is None else int(running),
            floor=min(floor or 0.0, 1.0 if ceiling is None else ceiling),
            ceiling=ceiling,
            tokens_per_minute=None if rate is None else int(rate),
        )


NONE = TenantLimits()


def _number(
    extra: Mapping[str, Any], name: str, least: float, most: float = math.inf
) -> float | None:
    value = extra.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if least <= value <= most and value < math.inf else None
