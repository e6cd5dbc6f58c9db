"""What is written down while a simulation runs: by request, by step, by tenant. Pure, duck-typed.

The hot part is once per step, whatever runs: tokens are not counted one by one where there is one
tenant, and who waits is asked only when somebody does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from scalellm_plugins.scheduling.fair import OUTPUT_WEIGHT

from .fairness import GapMeter
from .job import Outcome, Record, Request, Sample

MOST_SAMPLES = 800
"""When there are more, every other one is dropped and they are taken half as often."""

_OUTCOMES: dict[str, Outcome] = {"504": "dropped", "429": "refused"}
_PREFIX = "scalellm:"


class Collector:
    """Follows a workload's requests, known by their numbers as text."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        weights = {request.tenant: request.weight for request in requests}
        self.tenants = sorted(weights)
        self.records = [Record() for _ in requests]
        self.samples: list[Sample] = []
        self.gaps = GapMeter(weights)
        self.alive: dict[str, Any] = {}
        """vLLM's requests by id."""
        self.tokens = 0
        self.ended = 0
        self.kv_max = 0.0
        self._kv_area = self._kv = self._at = 0.0
        self._one = len(weights) == 1
        self._tenant = {str(number): one.tenant for number, one in enumerate(requests)}
        self._alive_of: Counter[str] = Counter()
        self._every = 1.0 / 64
        self._next_sample = 0.0

    def add(self, request_id: str, request: Any) -> None:
        """A request has been given to the engine."""
        self.alive[request_id] = request
        self._alive_of[self._tenant[request_id]] += 1

    def scheduled(self, request_ids: list[str], at: float) -> None:
        """Requests are new in a step that begins."""
        for request_id in request_ids:
            number = int(request_id)
            record = self.records[number]
            if record.scheduled is None:  # or it is back after a preemption
                record.scheduled = at
                one = self._requests[number]
                self.gaps.serve(one.tenant, prompt=one.prompt)

    def plain(self, request_ids: list[str]) -> None:
        """Requests have got one more token each, which is neither the first nor the last."""
        self.tokens += len(request_ids)
        if self._one:
            served = self.gaps.served
            weight = self._requests[0].weight
            served[self.tenants[0]] += OUTPUT_WEIGHT * len(request_ids) / weight
            return
        for tenant, tokens in Counter(map(self._tenant.__getitem__, request_ids)).items():
            self.gaps.serve(tenant, output=tokens)

    def output(self, output: Any, at: float) -> None:
        """The engine has said something of a request (an `EngineCoreOutput`)."""
        request_id = output.request_id
        record = self.records[int(request_id)]
        tokens = len(output.new_token_ids)
        if tokens:
            self.tokens += tokens
            if record.first is None:
                record.first = at
            self.gaps.serve(self._tenant[request_id], output=tokens)
        if output.finish_reason is not None:
            self._end(request_id, record, output, at)

    def _end(self, request_id: str, record: Record, output: Any, at: float) -> None:
        request = self.alive.pop(request_id)
        self._alive_of[self._tenant[request_id]] -= 1
        self.ended += 1
        record.last = at
        record.tokens = request.num_output_tokens
        record.preemptions = request.num_preemptions
        record.outcome, record.reason = _outcome(str(output.finish_reason), output.stop_reason)

    def step(self, at: float, running: Sequence[Any], kv: float) -> None:
        """A step has ended, with these still running and that share of KV blocks in use."""
        self._kv_area += self._kv * (at - self._at)
        self._at, self._kv = at, kv
        if kv > self.kv_max:
            self.kv_max = kv
        waiting = len(self.alive) - len(running)
        if not self._one:
            self.gaps.note(at, self._backlogged(running) if waiting > 1 else ())
        if at >= self._next_sample:
            self._sample(at, waiting, len(running), kv)

    def _backlogged(self, running: Sequence[Any]) -> list[str]:
        mine = Counter(self._tenant[request.request_id] for request in running)
        return [name for name, alive in self._alive_of.items() if alive > mine[name]]

    def _sample(self, at: float, waiting: int, running: int, kv: float) -> None:
        served = [round(self.gaps.served[name], 3) for name in self.tenants]
        self.samples.append(Sample(at=at, waiting=waiting, running=running, kv=kv, served=served))
        if len(self.samples) >= MOST_SAMPLES:
            del self.samples[1::2]
            self._every *= 2
        self._next_sample = at + self._every

    @property
    def kv_mean(self) -> float:
        """Share of KV blocks in use, mean over time."""
        return self._kv_area / self._at if self._at else 0.0


def _outcome(finish: str, stop: Any) -> tuple[Outcome, str]:
    if finish in ("length", "stop"):
        return "done", ""
    text = str(stop) if stop is not None else finish
    if not text.startswith(_PREFIX):
        return "failed", text
    status, _, message = text.removeprefix(_PREFIX).partition(":")
    # A status may say when to try again: 429;12.
    return _OUTCOMES.get(status.partition(";")[0], "failed"), message
