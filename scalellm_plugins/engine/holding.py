"""The engine keeps tokens that nobody reads yet.

A client that waits for the whole answer reads nothing before the last token; one that asked for
`stream_interval` 8 reads every eighth. vLLM sends every token of every request to the API server
all the same: an object to encode, a message to receive, decode and look up. Here the engine keeps
the tokens of requests that said so (`HOLD` in their extra arguments) and sends them together.

What metrics need is not lost: what was kept in each step, and when, travels with the next message,
and after half a second by itself, so that counters never lag further behind. The tokens stay: of
256 requests they were 5 outputs for each, of which one would do. Where vLLM ends a request early
(an abort, a pause), what is kept of it is still its client's.

Follows `vllm/v1/engine/core.py`: `step()` returns {client: EngineCoreOutputs}. Pure: duck-typed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .plain import whole

HOLD = "scalellm_hold"
"""In `sampling_params.extra_args`: send every so many tokens; 0: only at the end."""

KEPT = "scalellm_kept"
"""In an output's `kv_transfer_params`: [number of its tokens that were kept, time of the last step
that was kept (s, the engine's clock), steps]. `steps` are the client's, not the request's, and come
with one output of a message: for each step of which the client heard nothing, and last for this
one, what was kept in it as [tokens, [[inter-token latency, number of requests] …]]. With them every
step is counted once and as one step, and a latency once for all requests that had it."""

COUNTS = "scalellm_counts"
"""Request id of an output that is there to carry `KEPT`, where no other of its message can: all are
of requests of which nothing is kept, or there is none. vLLM's own code passes over ids that it
does not know."""

TAKE_KEPT = "scalellm_take_kept"
"""Method of the engine, for utility calls: end requests; return what was kept by request."""

Step = list[Any]
"""[tokens, [[latency in s, requests] …]], see `KEPT`."""

COUNTS_S = 0.5
"""What was kept is counted no later than this."""

STATS_S = 0.05
"""Gauges of the scheduler alone are not worth a message more often than this."""


class _Kept:
    """One request's tokens since they were last sent."""

    __slots__ = ("client", "early", "every", "last", "token_ids")

    def __init__(self, every: int, client: int) -> None:
        self.every = every
        self.client = client
        self.early = 0
        """Tokens that were sent before there were `every`; they count among the next ones."""
        self.token_ids: list[int] | None = None  # None until its first output has gone out
        self.last = 0.0
        """Time of its last token."""


class TokenHolder:
    """All requests of one engine that wait. Used from the engine's main loop only.

    Args:
        message: makes an `EngineCoreOutputs` with the one output whose request id and
            `kv_transfer_params` it is given; without it, counts wait for their client's next one.
    """

    def __init__(self, message: Callable[[str, dict[str, Any]], Any] | None = None) -> None:
        self._message = message
        self._kept: dict[str, _Kept] = {}
        self._steps: dict[int, list[Step]] = {}
        """Client → what was kept in each step since its last message."""
        self._counted: dict[int, float] = {}
        """Client → when it last heard what was kept (s, the engine's clock)."""
        self._stats_sent = 0.0
        self._aborted = False
        """Whether requests were aborted since it was last looked for counts that nobody sends."""

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, request: Any) -> None:
        """Look at a request that the engine has just been given."""
        params = request.sampling_params
        if params is not None and params.extra_args:
            every = params.extra_args.get(HOLD)
            if isinstance(every, int) and every >= 0:
                self._kept[request.request_id] = _Kept(every, request.client_index)

    def forget(self, request_ids: list[str]) -> None:
        """Requests were aborted: nobody waits for their tokens."""
        for request_id in request_ids:
            self._kept.pop(request_id, None)
        self._aborted = True

    def take(self, request_ids: list[str]) -> dict[str, list[int]]:
        """Give out what is kept of requests that end now: token ids by request."""
        taken = ((id_, self._kept.pop(id_, None)) for id_ in request_ids)
        return {id_: kept.token_ids for id_, kept in taken if kept and kept.token_ids}

    def release(
        self, client: int, request_ids: list[str]
    ) -> dict[str, tuple[list[int], dict[str, Any]]]:
        """Give out what is kept of a client's requests that the engine ends by itself.

        Returns request → (token ids, `kv_transfer_params`) for the output that ends it.
        """
        last = {id_: self._kept[id_].last for id_ in request_ids if id_ in self._kept}
        taken = self.take(request_ids)
        steps = [*self._steps.pop(client, ()), [0, []]] if taken else []
        given = {}
        for request_id, token_ids in taken.items():
            given[request_id] = (token_ids, {KEPT: [len(token_ids), last[request_id], steps]})
            steps = []
        return given

    def filter(self, step: dict[int, Any], droppable: Callable[[Any], bool]) -> None:
        """Take out of a step's outputs what can wait; put in what has waited.

        Args:
            step: client → its `EngineCoreOutputs`; changed in place, clients without news removed.
            droppable: whether scheduler statistics may be left out (see `can_wait`).
        """
        if not self._kept and not self._steps:
            return
        for client in list(step):
            outputs = step[client]
            now = outputs.timestamp
            if outputs.outputs:
                outputs.outputs = self._sift(client, whole(outputs.outputs), now)
            stats = outputs.scheduler_stats
            if not (outputs.outputs or outputs.finished_requests or outputs.utility_output) and (
                stats is None or (now - self._stats_sent < STATS_S and droppable(stats))
            ):
                del step[client]
            elif stats is not None:
                self._stats_sent = now
        if self._aborted and self._message is not None:
            self._aborted = False
            self._send_counts(step, self._message)

    def _send_counts(self, step: dict[int, Any], message: Callable[..., Any]) -> None:
        """Send what clients have to count of requests of which none is left: nothing else may come
        for hours. Their last step is counted as the message's own."""
        waiting = {kept.client for kept in self._kept.values()}
        for client in [one for one in self._steps if one not in waiting]:
            made = message(COUNTS, {KEPT: [0, 0.0, self._steps.pop(client)]})
            if (theirs := step.get(client)) is None:
                step[client] = made
            else:
                theirs.outputs = [*theirs.outputs, *made.outputs]

    def _sift(self, client: int, outputs: list[Any], now: float) -> list[Any]:
        news = []
        held = 0
        latencies: dict[float, int] = {}
        carrier = None
        for output in outputs:
            kept = self._kept.get(output.request_id)
            if kept is None:
                news.append(output)
            elif kept.token_ids is None or self._must_go(output, kept):
                carrier = self._with_kept(output, kept, now)
                news.append(output)
            else:
                kept.token_ids += output.new_token_ids
                latencies[kept.last] = latencies.get(kept.last, 0) + 1
                kept.last = now
                held += len(output.new_token_ids)
        step = [held, [[now - last, count] for last, count in latencies.items()]]
        waits = latencies or client in self._steps
        if waits and carrier is None and (news or now - self._counted.get(client, 0.0) > COUNTS_S):
            carrier = [0, 0.0, []]
            counts = {KEPT: carrier}
            news.append(
                type(outputs[0])(request_id=COUNTS, new_token_ids=[], kv_transfer_params=counts)
            )
        if carrier is not None:
            carrier[2] = [*self._steps.pop(client, ()), step]
            self._counted[client] = now
        elif latencies:
            self._steps.setdefault(client, []).append(step)
        return news

    def _must_go(self, output: Any, kept: _Kept) -> bool:
        if output.finish_reason is not None or output.events is not None:
            return True
        return bool(kept.every) and self._waiting(output, kept) >= kept.every

    @staticmethod
    def _waiting(output: Any, kept: _Kept) -> int:
        """How many tokens the client has not seen, with those of `output`."""
        return kept.early + len(kept.token_ids or ()) + len(output.new_token_ids)

    def _with_kept(self, output: Any, kept: _Kept, now: float) -> list[Any]:
        """Put into an output what was kept of its request; return what can carry counts."""
        tokens = len(kept.token_ids or ())
        if kept.token_ids is not None:  # the first output is shown at once
            waiting = self._waiting(output, kept)
            kept.early = waiting if waiting < kept.every else 0
        if kept.token_ids:
            output.new_token_ids = kept.token_ids + list(output.new_token_ids)
        carried: list[Any] = [tokens, kept.last, []]
        output.kv_transfer_params = {KEPT: carried}
        # The first output has everything about the prefill and goes out at once.
        kept.token_ids, kept.last = [], now
        if output.finish_reason is not None:
            del self._kept[output.request_id]
        return carried


def can_wait(stats: Any) -> bool:
    """Whether a step's `SchedulerStats` may be left out: the next step's say it all.

    The last before the engine sleeps may not: whoever reads the gauges then would see requests
    that are gone.
    """
    return bool(stats.num_running_reqs or stats.num_waiting_reqs) and only_gauges(stats)


def only_gauges(stats: Any) -> bool:
    """Whether `SchedulerStats` hold nothing but the state of this moment.

    What is counted since the last statistics (cache queries, drafts, transfers, evictions) would
    be lost with them.
    """
    prefix = stats.prefix_cache_stats
    counted = (
        prefix is not None and (prefix.requests or prefix.queries or prefix.reset),
        getattr(stats, "connector_prefix_cache_stats", None),
        getattr(stats, "kv_cache_eviction_events", None),
        stats.spec_decoding_stats,
        stats.kv_connector_stats,
        getattr(stats, "ec_connector_stats", None),
        getattr(stats, "cudagraph_stats", None),
        getattr(stats, "perf_stats", None),
        getattr(stats, "iteration_details", None),
    )
    return not any(counted)
