"""vLLM's scheduler, refusing requests that ask for it, with what it knows of them as the message.

A stand-in for the policies' own refusals: what the engine got, and how its word gets back, is then
seen by the client. Found by servers of tests as `telling_scheduler` (on their PYTHONPATH).
"""

from __future__ import annotations

import json
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from scalellm_plugins.scheduling.refused import Refused

LATE, FULL, MIDWAY = 1111, 2222, 3333
"""A deadline, a target for the first token and one for the others (ms) that ask for a refusal:
504 before prefill; 429 before prefill; 504 after some tokens."""


def verdict(request: Any) -> Refused | None:
    """Return what a request asks for."""
    extra = (request.sampling_params.extra_args if request.sampling_params else None) or {}
    if extra.get("scalellm_deadline_ms") == LATE:
        told = {"extra": extra, "priority": request.priority, "salt": request.cache_salt}
        return Refused(504, json.dumps(told))
    if extra.get("scalellm_ttft_ms") == FULL:
        return Refused(429, "The quota is used up.", retry_after_s=7)
    if extra.get("scalellm_tpot_ms") == MIDWAY and request.num_output_tokens >= 3:
        return Refused(504, "The deadline has passed.")
    return None


class TellingScheduler(AsyncScheduler):  # type: ignore[misc]
    """See the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last: list[tuple[int, Any]] = []

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Take out what is refused, then schedule the rest."""
        for request in [*self.waiting, *self.running]:
            refused = verdict(request)
            if refused is not None:
                output = EngineCoreOutput(
                    request.request_id,
                    [],
                    finish_reason=FinishReason.ERROR,
                    stop_reason=refused.reason(),
                )
                self._last.append((request.client_index, output))
                self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
        return super().schedule(*args, **kwargs)

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """Add the last outputs of what was refused."""
        made = super().update_from_output(*args, **kwargs)
        last, self._last = self._last, []
        for client, output in last:
            made.setdefault(client, EngineCoreOutputs()).outputs.append(output)
        return made
