"""Counting the lane's outputs for vLLM's metrics, but for the steady state (`lane.py` has that)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scalellm_plugins.engine.holding import KEPT

if TYPE_CHECKING:
    from .answers import Answer
    from .lane import Lane


class Tally:
    """One per lane."""

    def __init__(self, lane: Lane) -> None:
        from vllm.v1.metrics.stats import IterationStats

        self._lane = lane
        self._iteration_stats = IterationStats

    def first(self, answer: Answer, output: Any) -> None:
        """A request's first output: it is no longer queued."""
        answer.is_prefilling = False
        if answer.connection.admitted is not None:
            answer.connection.admitted.first()
        prefill = output.prefill_stats
        if prefill is not None:
            answer.num_cached_tokens = prefill.num_cached_tokens
            answer.num_cache_creation_tokens = prefill.num_cache_creation_tokens

    def unusual(self, answer: Answer, output: Any, timestamp: Any, stats: Any) -> None:
        """Have vLLM count an output that is more than tokens: the first, and those with events."""
        self._lane.processor._update_stats_from_output(answer, output, timestamp, stats)
        if answer.is_prefilling:
            self.first(answer, output)

    def held(self, answer: Answer, output: Any, timestamp: Any, stats: Any) -> None:
        """Count an output that may have brought tokens of several steps (see `KEPT`)."""
        kept = (output.kv_transfer_params or {}).get(KEPT)
        if stats is None:
            if answer.is_prefilling:
                self.first(answer, output)
            return
        tokens, last, steps = kept or (0, 0.0, ())
        if answer.is_prefilling:
            self.unusual(answer, output, timestamp, stats)
        else:
            known = answer.stats
            if output.events is not None:
                stats.update_from_events(
                    answer.request_id,
                    output.events,
                    False,
                    known,
                    self._lane.processor.lora_states,
                    None,
                )
            known.num_generation_tokens += len(output.new_token_ids)
            stats.num_generation_tokens += len(output.new_token_ids) - tokens
            self._lane.latencies.add(timestamp, max(last, known.last_token_ts), stats)
            known.last_token_ts = timestamp
        if steps:
            self._steps(steps, stats)

    def carried(self, output: Any, stats: Any) -> None:
        """Count what a message carries of requests that are not in it (see `COUNTS`)."""
        if stats is not None:
            self._steps(output.kv_transfer_params[KEPT][2], stats)

    def _steps(self, steps: list[Any], stats: Any) -> None:
        """Count what was kept in steps of the engine: the last is this message's own."""
        *unsent, (held, latencies) = steps
        stats.num_generation_tokens += held
        self._lane.latencies.add_groups(latencies, stats)
        for tokens, latencies in unsent:
            self._silent(tokens, latencies, stats)

    def _silent(self, tokens: int, latencies: list[Any], stats: Any) -> None:
        """Count a step of the engine that sent this client nothing."""
        lane = self._lane
        manager = lane.engine_client.logger_manager
        if lane.link is not None and lane.link.book.batching:
            lane.latencies.add_groups(latencies, stats)
            lane.link.book.silent_step(tokens)
        elif manager is not None:
            silent = self._iteration_stats()
            silent.num_generation_tokens = tokens
            self._lane.latencies.add_groups(latencies, silent)
            manager.record(scheduler_stats=None, iteration_stats=silent)
