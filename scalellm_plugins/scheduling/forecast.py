"""When a request will have its first token, and when it will have ended. Pure.

From the learnt step times and from what runs. What those cannot know (prompts that are in the
cache, budgets, who else comes) shows in how long first tokens really took, compared with what was
predicted: "at best" is as the fastest of late, "at worst" as all but the slowest.
"""

from __future__ import annotations

from collections import deque

from .policy import Engine, Work

RECENT = 64
"""First tokens that are remembered, and answers over whose lengths is averaged."""

_WORST = 0.95
"""Quantile."""

STALE_S = 10.0
"""Predictions are not trusted when nothing runs and no step was seen for so long. Else a machine
that was slow for a while, with everything given up in consequence, would never be tried again."""


class Forecast:
    """Predicts, and learns from what came true. Told what runs by whoever uses it."""

    def __init__(self, engine: Engine) -> None:
        self._times = engine.times
        self._step_tokens = engine.step_tokens
        self._running: dict[str, Work] = {}
        self._prefilling: dict[str, tuple[Work, float, float]] = {}
        """Running work without a first token, when it started, and how long that should take."""
        self._ratios: deque[float] = deque(maxlen=RECENT)
        """How long first tokens took, of what was predicted."""
        self._best = self._worst = 1.0
        self._seen = 0
        self._heard = float("-inf")
        """When the latest step was seen."""
        self._counted = (0, 0, 0)
        self._context = 0
        """Of all that runs, as of `_counted`: summed up once per step, not once per question."""
        self.share = 0.0
        """Of what they may (`most`), how many tokens requests generated. At first none: what is
        not known is no reason to give a request up."""
        self._answers = 0

    # What happens

    def started(self, work: Work, now: float) -> None:
        """Work begins to run."""
        if work.first is None:
            self._prefilling[work.id] = (work, now, self._first_token(work))
        self._running[work.id] = work

    def stopped(self, work: Work) -> bool:
        """Work runs no more; return whether it did."""
        self._prefilling.pop(work.id, None)
        return self._running.pop(work.id, None) is not None

    def answered(self, work: Work) -> None:
        """Work has run to its end."""
        self._answers = min(self._answers + 1, RECENT)
        self.share += (work.made / max(work.most, 1) - self.share) / self._answers

    def settle(self) -> None:
        """Compare the first tokens that have come with what was predicted."""
        for key, (work, start, predicted) in list(self._prefilling.items()):
            if work.first is None:
                continue
            del self._prefilling[key]
            if predicted > 0:
                self._ratios.append((work.first - start) / predicted)
                ordered = sorted(self._ratios)
                self._best, self._worst = ordered[0], ordered[int(_WORST * len(ordered))]

    # What will

    def is_stale(self, now: float) -> bool:
        """Whether what is predicted should be tried before it is believed."""
        if self._times.seen != self._seen:
            self._seen, self._heard = self._times.seen, now
        return not self._running and now - self._heard > STALE_S

    def prompt(self, work: Work, more: int = 0) -> float:
        """How long the prompt of waiting work takes after `more` other tokens, s."""
        decodes, context = self._load()
        chunk = max(1, self._step_tokens - decodes)
        full, rest = divmod(more + work.prompt + work.made, chunk)
        seconds = full * self._times.predict(chunk, decodes, context + chunk)
        if rest:
            seconds += self._times.predict(rest, decodes, context + rest)
        return seconds

    def first_token(self, work: Work, *, at_best: bool) -> float:
        """How long after its start waiting work has its first token, s, behind the prompts that
        have started already."""
        return self._first_token(work) * (self._best if at_best else self._worst)

    def answer(self, work: Work) -> float:
        """How long after its first token work ends, s, if its answer is as long as others'."""
        decodes, context = self._load()
        left = max(0.0, self.share * work.most - work.made)
        return left * self._times.predict(0, decodes + 1, context + work.prompt)

    def _load(self) -> tuple[int, int]:
        """Who decodes, and the context that a step reads."""
        counted = (self._times.seen, len(self._running), len(self._prefilling))
        if counted != self._counted:
            self._counted = counted
            self._context = sum([one.computed for one in self._running.values()])
        return len(self._running) - len(self._prefilling), self._context

    def _first_token(self, work: Work) -> float:
        begun = [one for one, *_ in self._prefilling.values()]
        return self.prompt(work, sum([max(0, one.prompt - one.computed) for one in begun]))
