"""vLLM's requests as policies see them."""

from __future__ import annotations

import time
from typing import Any

from .policy import Work
from .terms import DEFAULT, TENANT, Terms

_OLDEST_S = 3600.0
"""A request that came longer ago came from a machine with another clock."""


def tenant_of(request: Any) -> str:
    """Return the name of a request's tenant."""
    params = request.sampling_params
    extra = params.extra_args if params is not None else None
    return str(extra.get(TENANT, DEFAULT)) if extra else DEFAULT


class RequestWork(Work):
    """A request of vLLM's, as policies see it."""

    __slots__ = ("request",)

    def __init__(self, request: Any, terms: Terms, now: float) -> None:
        age = time.time() - request.arrival_time
        self.request = request
        super().__init__(
            request.request_id,
            arrival=now - (age if 0.0 < age < _OLDEST_S else 0.0),
            prompt=request.num_prompt_tokens,
            most=request.max_tokens,
        )
        self.priority = request.priority
        self.tenant, self.weight = terms.tenant, terms.weight
        self.ttft, self.tpot = terms.ttft_s, terms.tpot_s
        if terms.deadline_s is not None:
            self.due = self.arrival + terms.deadline_s

    # vLLM counts these; a policy that does not ask pays nothing for them.

    @property
    def computed(self) -> int:
        """Tokens whose KV the engine has, or will have after the steps under way."""
        return int(self.request.num_computed_tokens)

    @computed.setter
    def computed(self, value: int) -> None:
        pass

    @property
    def made(self) -> int:
        """Tokens generated so far."""
        return len(self.request._output_token_ids)

    @made.setter
    def made(self, value: int) -> None:
        pass
