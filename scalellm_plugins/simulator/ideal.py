"""What a GPU could do if nothing stood in front of it: the 100 % that a server is compared with.

A run in virtual time of N clients, each sending its next request when the last one is answered, on
an engine of no overhead that batches as vLLM's scheduler does: decodes first, then prompts in
chunks, in order of arrival, within `max_num_batched_tokens` and `max_num_seqs`. The step times are
the roofline's. Pure, and fast: the work is per request and per step, not per token.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scalellm_plugins.errors import ConfigError

from .roofline import Roofline


@dataclass(frozen=True)
class Request:
    """One request, in tokens. `cached_tokens` of the prompt are found in the prefix cache."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Batching:
    """The scheduler's limits, as vLLM's options of the same names."""

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 1024
    asynchronous: bool = False
    """Step n + 1 is fixed while step n runs, so that a request waits one step longer to join: the
    price of asynchronous scheduling, which an engine of no overhead would not have to pay.
    """


@dataclass(frozen=True)
class Latency:
    """Percentiles of a latency, s."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class IdealRun:
    """What came out. Times in s."""

    seconds: float
    requests: int
    prompt_tokens: int
    """Prompt tokens computed: without those found in the cache."""
    output_tokens: int
    output_tokens_per_s: float
    steps: int
    ttft: Latency
    itl: Latency
    """Between two tokens of one request; zeros if no request has two."""


@dataclass
class _Prefill:
    """A request on its way to its first token."""

    request: Request
    arrival: float
    computed: int = 0


@dataclass
class _Run:
    """The engine's state. Decodes are one group, since each of them gets one token in every step:
    their number, the sum of their lengths, and a heap of the steps at which they end.
    """

    roofline: Roofline
    batching: Batching
    now: float = 0.0
    step: int = 0
    waiting: deque[_Prefill] = field(default_factory=deque)
    prefills: list[_Prefill] = field(default_factory=list)
    decodes: int = 0
    context: int = 0
    ends: list[tuple[int, int]] = field(default_factory=list)
    """(step, length): when a decode gives its last token, and the context that it frees."""
    started: float = 0.0
    """When the latest step began."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttfts: list[tuple[float, int]] = field(default_factory=list)
    itls: list[tuple[float, int]] = field(default_factory=list)

    def advance(self) -> int:
        """Run one step; return how many requests it finished."""
        chunks = self._schedule()
        pairs = context = tokens = rows = 0
        for prefill, count in chunks:
            before = prefill.computed
            tokens += count
            pairs += before * count + count * (count + 1) // 2
            prefill.computed = before + count
            context += prefill.computed
            rows += prefill.computed == prefill.request.prompt_tokens
        seconds = self.roofline.step_seconds(
            tokens,
            self.decodes,
            context + self.context + self.decodes,
            prefill_pairs=pairs,
            prefill_rows=rows,
        )
        self.started = self.now
        self.now += seconds
        self.step += 1
        self.prompt_tokens += tokens
        return self._collect(seconds)

    def _schedule(self) -> list[tuple[_Prefill, int]]:
        """Chunks for this step: what the decodes leave of the budget, oldest prompt first."""
        budget = self.batching.max_num_batched_tokens - self.decodes
        chunks = []
        for prefill in self.prefills:
            count = min(prefill.request.prompt_tokens - prefill.computed, budget)
            if count:
                chunks.append((prefill, count))
                budget -= count
        # A request that came during the latest step missed it and, asynchronously, this one too;
        # unless the device stood still.
        idle = not self.decodes and not self.prefills
        horizon = self.started if self.batching.asynchronous and not idle else self.now
        while self.waiting and budget and self.waiting[0].arrival <= horizon:
            if self.decodes + len(self.prefills) >= self.batching.max_num_seqs:
                break
            prefill = self.waiting.popleft()
            # vLLM computes at least the last token of a prompt, cached or not.
            cached = min(prefill.request.cached_tokens, prefill.request.prompt_tokens - 1)
            prefill.computed = cached
            self.prefills.append(prefill)
            count = min(prefill.request.prompt_tokens - cached, budget)
            chunks.append((prefill, count))
            budget -= count
        return chunks

    def _collect(self, seconds: float) -> int:
        """Hand out the step's tokens."""
        finished = 0
        if self.decodes:
            self.itls.append((seconds, self.decodes))
            self.output_tokens += self.decodes
            self.context += self.decodes
            while self.ends and self.ends[0][0] == self.step:
                self.context -= heapq.heappop(self.ends)[1]
                self.decodes -= 1
                finished += 1
        for prefill in self.prefills:
            request = prefill.request
            if prefill.computed < request.prompt_tokens:
                continue
            self.ttfts.append((self.now - prefill.arrival, 1))
            self.output_tokens += 1
            if request.output_tokens == 1:
                finished += 1
                continue
            more = request.output_tokens - 1
            heapq.heappush(self.ends, (self.step + more, request.prompt_tokens + more))
            self.decodes += 1
            self.context += request.prompt_tokens
        self.prefills = [p for p in self.prefills if p.computed < p.request.prompt_tokens]
        return finished


def run(
    requests: Iterable[Request],
    streams: int,
    roofline: Roofline,
    batching: Batching | None = None,
    speed: float = 1.0,
) -> IdealRun:
    """Serve `requests`, in order, to `streams` clients that each wait for their answer.

    KV cache is taken to suffice: nothing is preempted. `speed` is `scalellm.sim.speed`.

    Raises:
        ConfigError: a request without a prompt or an output, or fewer than one stream.
    """
    coming = deque(requests)
    for request in coming:
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ConfigError(f"{request}: an ideal run needs a prompt and an output of 1 or more")
    if streams < 1:
        raise ConfigError(f"streams: {streams} clients send nothing; give 1 or more")
    limits = batching or Batching()
    if limits.max_num_seqs > limits.max_num_batched_tokens:
        raise ConfigError(
            f"max_num_batched_tokens: {limits.max_num_batched_tokens} must be at least "
            f"max_num_seqs ({limits.max_num_seqs}), as in vLLM"
        )
    total = len(coming)
    state = _Run(roofline, limits)
    free = min(streams, total)
    done = 0
    while done < total:
        for _ in range(min(free, len(coming))):
            state.waiting.append(_Prefill(coming.popleft(), state.now))
        free = state.advance()
        done += free
    return _summary(state, total, speed)


def _summary(state: _Run, total: int, speed: float) -> IdealRun:
    seconds = state.now / speed
    return IdealRun(
        seconds=seconds,
        requests=total,
        prompt_tokens=state.prompt_tokens,
        output_tokens=state.output_tokens,
        output_tokens_per_s=state.output_tokens / seconds if seconds else 0.0,
        steps=state.step,
        ttft=_latency(state.ttfts, speed),
        itl=_latency(state.itls, speed),
    )


def _latency(weighted: Sequence[tuple[float, int]], speed: float) -> Latency:
    """Percentiles of (value, how often) pairs."""
    pairs = sorted(weighted)
    count = sum(weight for _, weight in pairs)
    if not count:
        return Latency(0.0, 0.0, 0.0, 0.0)
    mean = sum(value * weight for value, weight in pairs) / count / speed
    wanted = [0.50, 0.90, 0.99]
    found: list[float] = []
    passed = 0
    for value, weight in pairs:
        passed += weight
        while len(found) < len(wanted) and passed >= wanted[len(found)] * count:
            found.append(value / speed)
    return Latency(mean, *found)
