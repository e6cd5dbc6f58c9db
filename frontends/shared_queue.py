"""vLLM's limits on queued requests and tokens, exact over all workers.

`--max-num-queued-reqs` and `--max-num-queued-tokens` are checked by vLLM where a request is about
to be handed to the engine, and the request is counted a moment later in the same turn of the event
loop. With several processes others get in between. Here the check claims room under a lock that all
workers share, the counting redeems the claim, and what is not redeemed ends with the turn.
`QueueCounts` is pure; the rest wraps vLLM's objects, where such a limit was given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from .shared_counters import SharedCounters, SharedLock

_REQUESTS, _TOKENS, _CLAIMED = range(3)


class QueueCounts:
    """What is queued, over all workers; `lock` keeps others from adding. See the module."""

    def __init__(self, slots: int) -> None:
        self._counters = SharedCounters(3, slots)
        self.lock = SharedLock("scalellm_queue")

    def requests(self) -> int:
        """Return how many requests there are, claimed ones included."""
        return self._counters.sum(_REQUESTS) + self._counters.sum(_CLAIMED)

    def tokens(self) -> int:
        """Return the prompt tokens of requests without a first token."""
        return self._counters.sum(_TOKENS)

    def add(self, slot: int, requests: int, tokens: int) -> None:
        """Add (or take away, which needs no lock)."""
        self._counters.add(_REQUESTS, slot, requests)
        self._counters.add(_TOKENS, slot, tokens)

    def claim(self, slot: int, requests: int) -> None:
        """Claim room for so many requests, in place of what the worker had claimed before."""
        self._counters.put(_CLAIMED, slot, requests)

    def clear(self, slot: int) -> None:
        """Forget a worker that is gone; by the supervisor."""
        for counter in (_REQUESTS, _TOKENS, _CLAIMED):
            self._counters.put(counter, slot, 0)


class Turnstile:
    """One worker's side: what it lets in. `refuse()` returns the error for too many tokens."""

    def __init__(
        self,
        counts: QueueCounts,
        slot: int,
        max_tokens: int | None,
        refuse: Callable[[], Exception],
        later: Callable[[Callable[[], None]], Any],
    ) -> None:
        self.counts = counts
        self._slot = slot
        self._max_tokens = max_tokens
        self._refuse = refuse
        self._later = later
        self._claimed = 0
        self._first = False
        self._prefilling: dict[str, Any] = {}

    def check(self, check: Callable[[], None], claim: int) -> None:
        """Run vLLM's check on the counts of all workers; claim room if it passes."""
        with self.counts.lock:
            check()
            if not claim:
                return
            if not self._claimed:
                self._later(self._expire)
            self._claimed, self._first = claim, True
            self.counts.claim(self._slot, claim)

    def _expire(self) -> None:
        self._claimed, self._first = 0, False
        self.counts.claim(self._slot, 0)

    def enter(self, request_id: str, state: Any) -> None:
        """Count a request.

        Raises:
            Exception: what `refuse` returns, if another worker's tokens came in between.
        """
        counts = self.counts
        with counts.lock:
            if self._claimed:
                full = self._max_tokens is not None and counts.tokens() >= self._max_tokens
                if self._first and full:
                    self._expire()
                    raise self._refuse()
                self._first = False
                self._claimed -= 1
                counts.claim(self._slot, self._claimed)
            counts.add(self._slot, 1, state.prompt_len)
        self._prefilling[request_id] = (state, state.prompt_len)

    def first_tokens(self) -> None:
        """Requests that have a first token by now are not queued any more."""
        for request_id, (state, tokens) in list(self._prefilling.items()):
            if not state.is_prefilling:
                del self._prefilling[request_id]
                self.counts.add(self._slot, 0, -tokens)

    def leave(self, request_id: str) -> None:
        """A request is gone."""
        _, tokens = self._prefilling.pop(request_id, (None, 0))
        self.counts.add(self._slot, -1, -tokens)


class CountedStates(dict[str, Any]):
    """vLLM's `request_states`, counting what enters and leaves."""

    def __init__(self, turnstile: Turnstile) -> None:
        super().__init__()
        self._turnstile = turnstile

    def __setitem__(self, request_id: str, state: Any) -> None:
        if request_id not in self:
            self._turnstile.enter(request_id, state)
        super().__setitem__(request_id, state)

    def __delitem__(self, request_id: str) -> None:
        super().__delitem__(request_id)
        self._turnstile.leave(request_id)

    def pop(self, request_id: str, *default: Any) -> Any:
        """See dict."""
        there = request_id in self
        state = super().pop(request_id, *default)
        if there:
            self._turnstile.leave(request_id)
        return state


def install(engine_client: Any, counts: QueueCounts, slot: int) -> None:
    """Have an engine client (an `AsyncLLM`) hold its limits over all workers, if it has any.

    Called before anything remembers `request_states`, while nothing is served.
    """
    limits = engine_client.scheduler_config
    max_tokens = getattr(limits, "max_num_queued_tokens", None)
    if max_tokens is None and getattr(limits, "max_num_queued_reqs", None) is None:
        return
    from vllm.exceptions import MaxQueuedTokensError

    def refuse() -> Exception:
        if hasattr(engine_client, "_record_admission_rejection"):
            engine_client._record_admission_rejection("max_num_queued_tokens")
        error: Exception = MaxQueuedTokensError()
        return error

    turnstile = Turnstile(counts, slot, max_tokens, refuse, asyncio.get_running_loop().call_soon)
    processor = engine_client.output_processor
    assert not processor.request_states, "requests before the server is up"
    processor.request_states = CountedStates(turnstile)
    # vLLM's check asks these; its own counts over processes are behind by a turn.
    processor.admission_stats = engine_client.admission_stats = None
    engine_client.get_num_unfinished_requests = counts.requests
    engine_client.get_num_queued_tokens = counts.tokens
    check, outputs = engine_client.check_admission, processor.process_outputs

    def check_admission(n: int = 1, request_id: str | None = None) -> None:
        # Without an id it is a look ahead of the work; the request comes, and is checked, later.
        turnstile.check(lambda: check(n, request_id), n if request_id is not None else 0)

    def process_outputs(*args: Any, **kwargs: Any) -> Any:
        result = outputs(*args, **kwargs)
        turnstile.first_tokens()
        return result

    engine_client.check_admission = check_admission
    processor.process_outputs = process_outputs
