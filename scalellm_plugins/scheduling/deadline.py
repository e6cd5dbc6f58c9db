"""Deadlines: least slack first, and no work on what is lost.

A request may say when it wants its first token (`ttft`), how fast the others (`tpot`), or when it
must have ended (`due`). From the predicted time of its prompt, and of its answer if it is due,
follows when it must start at the latest; whoever must start first is next. That order (earliest
deadline first) is the best one while everything can be served (Liu and Layland, JACM 20, 1973) and
the worst when it cannot: every request is served when it is too late already. So waiting work that
would be late is given up before its prompt is computed, and what is computed is in time.

While somebody else waits, work is given up that would be late at worst; by itself, only what would
be late even at best (`forecast.py`). Who has begun to get an answer is never given up.

Pure: no vLLM, no clock.
"""

# ruff: noqa: ARG002  (methods of `Policy` that need not know all that they are told)

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .forecast import Forecast
from .pace import Pace
from .policy import Engine, Policy, Verdict, Work

if TYPE_CHECKING:
    from scalellm_plugins.config import SchedulerConfig

PATIENCE_S = 30.0
"""Work without a TTFT target or a deadline is taken to want its first token so long after its
arrival."""

UNHURRIED_SHARE = 0.1
"""What work without targets gets, in prompt tokens, of what is computed for work with targets that
cannot spare the time: nothing starves, and no flood without targets takes more than that."""

_TIMED, _UNHURRIED, _DEMOTED = range(3)
"""Groups: with a target for the start, without one, and found hopeless."""


class Deadline(Policy):
    """Least slack first; see the module."""

    name = "deadline"
    preempts = True
    ranks = True
    gives_up = True
    yields = True
    paces = True

    def __init__(self, engine: Engine, options: SchedulerConfig) -> None:
        super().__init__(engine, options)
        self._forecast = Forecast(engine)
        self._pace = Pace(engine.times)
        self._starts: dict[str, float] = {}
        """When work must start at the latest, by id, until it ends."""
        self._waiting: dict[str, float] = {}
        """How long the prompts of waiting work take, by id: with targets for the start …"""
        self._ahead = 0.0
        """… (all together) …"""
        self._unhurried: set[str] = set()
        """… and, without times, all others."""
        self._paced: set[str] = set()
        """Running work that may be behind its pace."""
        self._credit = self._before = 0.0
        """Prompt tokens that unhurried work may have out of turn, now and before the last start."""

    # Who is next

    def group(self, work: Work) -> Hashable:
        if work.demoted:
            return _DEMOTED
        return _UNHURRIED if work.ttft is None and work.due is None else _TIMED

    def order(self, work: Work) -> Any:
        return self._starts[work.id]

    def first(self, heads: Mapping[Hashable, Work], now: float) -> Hashable:
        timed, unhurried = heads.get(_TIMED), heads.get(_UNHURRIED)
        if timed is None or unhurried is None:
            return min(heads)  # type: ignore[type-var]
        if self._starts[timed.id] <= self._starts[unhurried.id]:
            return _TIMED
        # Its patience ends first. It goes if all the others can wait that long, or as its share.
        spare = self._urgent(timed) - now - self._ahead
        if self._credit >= 0 or spare >= self._forecast.prompt(unhurried):
            return _UNHURRIED
        return _TIMED

    def _urgent(self, work: Work) -> float:
        """When half of the time that work can wait is over: the rest is for what goes wrong."""
        return (work.arrival + self._starts[work.id]) / 2

    # What happens

    def arrived(self, work: Work, waiting: Collection[Hashable], now: float) -> None:
        prompt = self._forecast.prompt(work)
        latest = float("inf")
        if work.ttft is not None:
            latest = work.arrival + work.ttft
        if work.due is not None:
            latest = min(latest, work.due - self._forecast.answer(work))
        if latest == float("inf"):
            latest = work.arrival + PATIENCE_S
        self._starts[work.id] = latest - prompt
        self._wait(work, prompt)

    def admitted(self, work: Work, now: float) -> None:
        self._forecast.settle()
        self._before = self._credit
        self._leave(work)
        self._charge(work)
        self._forecast.started(work, now)
        if work.tpot is not None or work.due is not None:
            self._paced.add(work.id)

    def withdrawn(self, work: Work, now: float) -> None:
        self._credit = self._before
        self.preempted(work, now)

    def preempted(self, work: Work, now: float) -> None:
        self._forecast.stopped(work)
        self._unpace(work)
        self._wait(work, self._forecast.prompt(work))

    def ended(self, work: Work, now: float) -> None:
        self._forecast.settle()
        if self._forecast.stopped(work) and work.made:
            self._forecast.answered(work)
        self._unpace(work)
        self._leave(work)
        self._starts.pop(work.id, None)

    def _unpace(self, work: Work) -> None:
        self._paced.discard(work.id)
        if not self._paced:
            self._pace.forget()

    def _wait(self, work: Work, prompt: float) -> None:
        if self.group(work) == _TIMED:
            self._waiting[work.id] = prompt
            self._ahead += prompt
        else:
            self._unhurried.add(work.id)

    def _leave(self, work: Work) -> None:
        self._ahead -= self._waiting.pop(work.id, 0.0)
        if not self._waiting:
            self._ahead = 0.0  # what rounding left
        self._unhurried.discard(work.id)

    def _charge(self, work: Work) -> None:
        """Work without targets that went before such with targets owes for it, and is paid by
        what is computed for those."""
        group = self.group(work)
        if group == _UNHURRIED and self._waiting and self._credit >= 0:
            self._credit = -float(work.prompt)
        elif group == _TIMED:
            self._credit = min(0.0, self._credit + UNHURRIED_SHARE * work.prompt)

    # Who gives way

    def victim(self, work: Work, running: Sequence[Work], now: float) -> Work | None:
        """Work without any target gives way to work that is about to miss its own.

        What was preempted n times then runs `min_run_s` n times, so that it comes to an end.
        """
        if self.group(work) != _TIMED or work.first is not None:
            return None
        if now < self._urgent(work):
            return None
        least = self.options.min_run_s
        going = [
            one
            for one in running
            if (one.demoted or (one.ttft is None and one.tpot is None and one.due is None))
            and one.since is not None
            and now - one.since >= one.preemptions * least
        ]
        # Whoever has the least to compute again.
        return min(going, key=lambda one: one.computed, default=None)

    def rank(self, work: Work, now: float) -> Any:
        return self.group(work), self._starts[work.id]

    # Deadlines

    def hopeless(self, work: Work, now: float) -> Verdict | None:
        if work.first is not None or self.group(work) != _TIMED:
            return None
        self._forecast.settle()
        alone = len(self._waiting) + len(self._unhurried) <= 1
        trusted = not self._forecast.is_stale(now)
        first = self._forecast.first_token(work, at_best=alone) if trusted else 0.0
        if work.ttft is not None and now + first > work.arrival + work.ttft:
            what = f"the first token cannot come within {work.ttft * 1e3:.0f} ms"
            return self._verdict(work, now, first, what, "scalellm_ttft_ms")
        # By itself: even with an answer of one token.
        answer = self._forecast.answer(work) if trusted and not alone else 0.0
        if work.due is not None and now + first + answer > work.due:
            what = f"the answer cannot end within {(work.due - work.arrival) * 1e3:.0f} ms"
            return self._verdict(work, now, first + answer, what, "scalellm_deadline_ms")
        return None

    def _verdict(self, work: Work, now: float, more: float, what: str, key: str) -> Verdict:
        drop = self.options.late == "drop"
        if not drop:
            # It waits on, among those that nobody has to wait for.
            self._leave(work)
            self._unhurried.add(work.id)
        waited = (now - work.arrival) * 1e3
        return Verdict(
            message=(
                f"deadline: {what} any more (waited {waited:.0f} ms, takes {more * 1e3:.0f} ms "
                f"more). Send fewer requests at a time, or allow more with {key}"
            ),
            drop=drop,
        )

    def resting(self, running: Sequence[Work], now: float) -> Collection[Work]:
        return self._pace.resting(running, self._forecast.share, now) if self._paced else ()

    def step_s(self, running: Sequence[Work], now: float) -> float | None:
        return self._pace.step_s(running, self._forecast.share, now) if self._paced else None
