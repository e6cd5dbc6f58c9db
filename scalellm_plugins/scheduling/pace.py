"""How long steps may take so that streams keep their pace, and who rests for it. Pure.

Prompts are the first to give way: a step takes only as many of their tokens as leave it short
enough (`budget.py`). But decoding alone can be too slow: a step takes longer the more KV it reads,
so a stream with a long context slows down all others. If one of them cannot keep its time per
token (TPOT) like that, and could without some that are ahead of theirs, then those rest for a step.
Nobody rests in vain: not if the step would hardly be shorter, not if the pace is lost either way,
and not if it will be made up anyway. And nobody rests so long that it falls behind itself, or that
a token takes longer than its TPOT, however far ahead it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .policy import Work
from .step_times import StepTimes

HORIZON = 64
"""Tokens within which a stream is to be back at its pace; what comes later is a guess."""

AIM = 0.95
"""Of a TPOT target: the last step may turn out longer, and nothing comes after it."""

EASY_TPOT_S = 0.1
"""Work without a TPOT target is taken to be content with that when others need it to rest."""

LOST = 2.0
"""Where a pace cannot be kept, a step may take so many times what decoding alone is predicted to:
prompts get nearly all of the engine even so, and a prediction that is wrong is found out."""

LEAST_GAIN = 0.1
"""Of a step's time; nobody rests for less."""


def keeps_pace(work: Work, now: float, rests: int = 0) -> float:
    """How long steps may take on average so that a stream with a TPOT target keeps it, s, though
    it gets no token in `rests` of them. Infinite before its first token."""
    if work.tpot is None or work.first is None:
        return float("inf")
    steps = max(1, min(work.most - work.made, HORIZON))
    due = work.first + AIM * work.tpot * (work.made - 1 + steps)
    return (due - now) / (steps + rests)


def is_in_time(work: Work, share: float, now: float, rests: int = 0) -> float:
    """The same for work that has to end in time, if it generates `share` of what it may."""
    if work.due is None:
        return float("inf")
    return (work.due - now) / (max(1, int(share * work.most) - work.made) + rests)


class Pace:
    """Compares what running streams need with what steps take. One per policy: it remembers who
    rests, and since when."""

    def __init__(self, times: StepTimes) -> None:
        self._times = times
        self._rested: dict[str, float] = {}
        self.forget()

    def forget(self) -> None:
        """Nobody has a pace to keep any more: keep nothing of those that had."""
        self._looked: tuple[float, int] | None = None
        """When, and at how many: both questions of a step are answered by one look, which costs
        0.4 µs per stream."""
        self._decodes: list[Work] = []
        self._context = 0
        self._alone = 0.0
        self._paces: list[float] = []

    def step_s(self, running: Sequence[Work], share: float, now: float) -> float | None:
        """How long a step may take so that everybody keeps its targets who can, s; None: any time.

        `share`: of what they may, how many tokens requests generate.
        """
        self._look(running, now)
        dues = [is_in_time(work, share, now) for work in self._decodes if work.due is not None]
        alone = self._alone
        able = [least if least > alone else LOST * alone for least in self._paces + dues]
        found = min(able, default=0.0)
        return found if 0 < found < float("inf") else None

    def resting(self, running: Sequence[Work], share: float, now: float) -> Collection[Work]:
        """Who gets no token in this step. Never all: who needs it goes on.

        Only for the sake of TPOT targets: where time is short to the end of an answer, resting
        costs more in throughput than it saves (measured: 0.535 in time instead of 0.544).
        """
        before, self._rested = self._rested, {}
        self._look(running, now)
        step, context = self._alone, self._context
        slow = [least for least in self._paces if least < step]
        if not slow:
            return ()
        able = [
            work
            for work in self._decodes
            if self._can_rest(work, before.get(work.id, now), share, now)
        ]
        # Those with the longest contexts first, so that few rest.
        able.sort(key=lambda work: work.computed, reverse=True)
        steps = []
        for count, work in enumerate(able, 1):
            context -= work.computed
            steps.append(self._times.predict(0, len(self._decodes) - count, context))
        if not steps or steps[-1] > step * (1 - LEAST_GAIN):
            return ()
        helped = [least for least in slow if least >= steps[-1]]
        if not helped:
            return ()
        enough = next(count for count, one in enumerate(steps, 1) if one <= min(helped))
        self._rested = {work.id: before.get(work.id, now) for work in able[:enough]}
        return able[:enough]

    def _can_rest(self, work: Work, since: float, share: float, now: float) -> bool:
        """Whether it keeps its targets though it rests in a step: now, and in the end."""
        step = self._alone
        pace = EASY_TPOT_S if work.tpot is None else work.tpot
        if now + 2 * step - since > pace:
            return False
        if work.tpot is not None and work.first is not None:
            next_due = work.first + AIM * work.tpot * work.made
            if next_due - now < 2 * step:
                return False
        return min(keeps_pace(work, now, 1), is_in_time(work, share, now, 1)) >= step

    def _look(self, running: Sequence[Work], now: float) -> None:
        """Who decodes in a step, what that reads, how long it takes, and what pace it needs."""
        if self._looked == (now, len(running)):
            return
        self._looked = now, len(running)
        self._decodes = [one for one in running if one.prompt + one.made - one.computed <= 1]
        self._context = sum([work.computed for work in self._decodes])
        self._alone = self._times.predict(0, len(self._decodes), self._context)
        self._paces = [keeps_pace(work, now) for work in self._decodes if work.tpot is not None]
