"""From what a scheduler asks of a step to its work and its tokens. Pure: duck-typed, no vLLM.

This is the simulator's own CPU, spent inside the engine's process, so it is kept to C-level loops:
measured by `python -m scalellm_plugins.benchmarks.sim_clock`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Any

from .roofline import Roofline
from .tokens import MASK, seed_of


@dataclass
class Step:
    """One step, laid out as a model runner reports it."""

    seconds: float
    request_ids: list[str]
    index: dict[str, int]
    """Request id → position in the lists."""
    tokens: list[list[int]]
    """Per request one token, or none where the prompt is not complete yet."""


@dataclass
class Requests:
    """What a model runner remembers of its requests between steps.

    Everything else is in each step's schedule, so nothing here has to follow preemptions: a request
    that comes back says how much of it is computed and how long it is.
    """

    roofline: Roofline
    table: list[int]
    _prompt_lengths: dict[str, int] = field(default_factory=dict)
    _seeds: dict[str, int] = field(default_factory=dict)
    # The last pure-decode batch. Batches repeat for as long as nobody comes or goes, and comparing
    # the ids (identical strings) is ten times cheaper than looking each of them up again.
    _batch_ids: list[str] = field(default_factory=list)
    _batch_index: dict[str, int] = field(default_factory=dict)
    _batch_seeds: list[int] = field(default_factory=list)
    _batch_prompts: int = 0

    def __len__(self) -> int:
        return len(self._prompt_lengths)

    def add(self, request_id: str, prompt_length: int, prompt: Sequence[int] | None) -> None:
        """Remember a request; `prompt` is None where only its embeddings are known."""
        self._prompt_lengths[request_id] = prompt_length
        self._seeds[request_id] = seed_of(prompt) & MASK

    def finish(self, request_ids: Iterable[str]) -> None:
        """Forget requests; ids that are unknown are fine."""
        for request_id in request_ids:
            self._prompt_lengths.pop(request_id, None)
            self._seeds.pop(request_id, None)

    def step(self, scheduled: Any) -> Step:
        """Take in a `SchedulerOutput` with at least one token and lay out its step."""
        new = scheduled.scheduled_new_reqs
        cached = scheduled.scheduled_cached_reqs
        if not new and scheduled.total_num_scheduled_tokens == len(cached.req_ids):
            step = self._decode_step(cached)
            if step is not None:
                return step
        return self._mixed_step(scheduled.num_scheduled_tokens, new, cached)

    def _decode_step(self, cached: Any) -> Step | None:
        """The step if every request decodes; None if some one-token share is of a prompt."""
        ids = cached.req_ids
        if ids != self._batch_ids:
            self._batch_ids = ids
            self._batch_index = dict(zip(ids, range(len(ids)), strict=True))
            self._batch_seeds = [self._seeds[id_] for id_ in ids]
            self._batch_prompts = sum([self._prompt_lengths[id_] for id_ in ids])
        computed = cached.num_computed_tokens
        context = sum(computed) + len(ids)
        # No request can have more computed than it is long, so equal sums mean equal everywhere.
        if context != self._batch_prompts + sum(cached.num_output_tokens):
            return None
        words = self.table
        return Step(
            self.roofline.step_seconds(0, len(ids), context),
            ids,
            self._batch_index,
            [[words[at & MASK]] for at in map(add, self._batch_seeds, computed)],
        )

    def _mixed_step(self, share: dict[str, int], new: Any, cached: Any) -> Step:
        """Any step: prompts, chunks of prompts, resumed requests and decodes together."""
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        lengths = {
            id_: self._prompt_lengths[id_] + outputs
            for id_, outputs in zip(cached.req_ids, cached.num_output_tokens, strict=True)
        }
        for request in new:
            id_ = request.req_id
            self.add(id_, request.prompt_len, request.prompt_token_ids)
            computed[id_] = request.num_computed_tokens
            # A resumed request comes as a new one with its outputs behind the prompt. That list is
            # the scheduler's own and grows later; its length now is what is known of the request.
            known = request.prefill_token_ids
            lengths[id_] = request.prompt_len if known is None else len(known)
        words = self.table
        tokens: list[list[int]] = []
        prefill = decodes = context = pairs = rows = 0
        for id_, count in share.items():
            before = computed[id_]
            after = before + count
            emits = after >= lengths[id_]
            context += after
            if count == 1 and emits:
                decodes += 1
            else:
                prefill += count
                pairs += before * count + count * (count + 1) // 2
                rows += emits
            tokens.append([words[(self._seeds[id_] + after - 1) & MASK]] if emits else [])
        seconds = self.roofline.step_seconds(
            prefill, decodes, context, prefill_pairs=pairs, prefill_rows=rows
        )
        ids = list(share)
        return Step(seconds, ids, dict(zip(ids, range(len(ids)), strict=True)), tokens)
