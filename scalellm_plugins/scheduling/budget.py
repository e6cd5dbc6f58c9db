"""How many prompt tokens a step may take so that the streams in it keep their pace. Pure.

A fixed `max_num_batched_tokens` is a guess: too many, and every stream stalls while a long prompt
is computed; too few, and prompts wait though nothing is decoded. Here the time of a step is given,
and its tokens follow from the learnt step times: many beside few streams, few beside many, all of
them where nothing is decoded (the idea of Sarathi-Serve, arXiv 2403.02310, with a measured budget
instead of a profiled one).
"""

from __future__ import annotations

from .policy import Engine

FLOOR = 32
"""Prompts always get one in so many of a step's tokens (and one KV block): they must advance even
where decoding alone takes longer than it should."""

_GAIN = 0.1
"""How much of a step's error is corrected in the next."""

_LEAST_AIM = 0.25
"""Of the target; what is aimed at is never less, whatever was measured."""


class PrefillBudget:
    """The budget for one engine. To be asked once before each step, also while nothing is decoded:
    the time between two questions is taken for that of the step between them."""

    def __init__(self, target_s: float | None, engine: Engine) -> None:
        self.target_s = target_s
        """How long a step with decodes may take, s: the TPOT of the streams in it. None: as long
        as it likes."""
        self._engine = engine
        self.floor = min(engine.step_tokens, max(engine.block_tokens, engine.step_tokens // FLOOR))
        self._aim = 1.0
        """What is aimed at, of the target."""
        self._asked: tuple[float, float] | None = None
        """When the last step began and its target, if there was one that a budget could keep."""

    def tokens(self, decodes: int, context: int, now: float, target_s: float | None = None) -> int:
        """Return how many tokens of prompts the next step may take.

        Args:
            decodes: sequences that get a token in it.
            context: tokens of KV cache that they have, in all.
            now: s.
            target_s: of this step (`Policy.step_s`), if it is less than that of all.
        """
        self._correct(now)
        self._asked = None
        targets = [one for one in (self.target_s, target_s) if one is not None]
        if not decodes or not targets:
            return self._engine.step_tokens
        target = min(targets)
        found = self._solve(decodes, context, target * self._aim)
        if found > self.floor:
            self._asked = now, target
        return found

    def _correct(self, now: float) -> None:
        """What steps take beside what `StepTimes` was told is taken off the target."""
        if self._asked is None:
            return
        began, target = self._asked
        # A step of any length counts as one of twice the target: it may be an accident.
        error = max(-1.0, 1 - (now - began) / target)
        self._aim = max(_LEAST_AIM, min(1.0, self._aim * (1 + _GAIN * error)))

    def _solve(self, decodes: int, context: int, limit: float) -> int:
        """The most whole blocks with which a step is no longer than `limit`, s. More tokens are
        never predicted to take less."""
        times, block = self._engine.times, self._engine.block_tokens
        low, high = 0, -(-self._engine.step_tokens // block)
        while low < high:
            middle = (low + high + 1) // 2
            tokens = middle * block
            if times.predict(tokens, decodes, context + tokens) <= limit:
                low = middle
            else:
                high = middle - 1
        return max(self.floor, min(low * block, self._engine.step_tokens))
