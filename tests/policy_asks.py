"""Requests for tests of policies: what is asked, what became of it, and whole workloads."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st

from scalellm_plugins.scheduling.policy import Work


@dataclass(frozen=True)
class Ask:
    """One request, times in s; `ttft`, `tpot` and `due` count from its arrival."""

    at: float
    prompt: int
    output: int
    most: int | None = None
    tenant: str = "default"
    weight: float | None = None
    priority: int = 0
    ttft: float | None = None
    tpot: float | None = None
    due: float | None = None

    def work(self, number: int) -> Work:
        """What the policy sees of it."""
        made = Work(
            f"r{number}", arrival=self.at, prompt=self.prompt, most=self.most or self.output
        )
        for name in ("tenant", "weight", "priority", "ttft", "tpot"):
            setattr(made, name, getattr(self, name))
        made.due = None if self.due is None else self.at + self.due
        return made


@dataclass
class Outcome:
    """What became of a request."""

    ask: Ask
    work: Work
    finished: float | None = None
    error: str | None = None
    """Its message, if it was dropped."""
    starts: int = 0

    @property
    def ttft(self) -> float:
        """From arrival to first token, s; infinite if there was none."""
        first = self.work.first
        return float("inf") if first is None else first - self.ask.at

    @property
    def tpot(self) -> float:
        """Mean time between its tokens, s; infinite if it did not finish."""
        if self.finished is None or self.work.first is None:
            return float("inf")
        return (self.finished - self.work.first) / max(1, self.work.made - 1)

    @property
    def met(self) -> bool:
        """Whether it finished, and within all of its targets."""
        return (
            self.finished is not None
            and (self.ask.ttft is None or self.ttft <= self.ask.ttft)
            and (self.ask.tpot is None or self.tpot <= self.ask.tpot)
            and (self.ask.due is None or self.finished <= self.ask.at + self.ask.due)
        )


def poisson(
    rate: float, seconds: float, ask: Callable[[random.Random, float], Ask], seed: int = 0
) -> list[Ask]:
    """Requests at random times, `rate` per s; `ask` makes each from a generator and its time."""
    chance = random.Random(seed)
    asks = []
    at = chance.expovariate(rate)
    while at < seconds:
        asks.append(ask(chance, at))
        at += chance.expovariate(rate)
    return asks


def lengths(chance: random.Random, mean: int, most: int) -> int:
    """A length as chats have them: lognormal, the long tail cut off."""
    return max(1, min(most, int(chance.lognormvariate(0, 0.8) * mean * 0.726)))


workloads = st.lists(
    st.builds(
        Ask,
        at=st.floats(0, 2),
        prompt=st.integers(1, 200),
        output=st.integers(1, 60),
        most=st.none() | st.just(100),
        tenant=st.sampled_from(["a", "b", "c"]),
        weight=st.none() | st.sampled_from([0.5, 2.0]),
        priority=st.integers(-1, 2),
        ttft=st.none() | st.floats(0.001, 1),
        tpot=st.none() | st.floats(0.001, 0.1),
        due=st.none() | st.floats(0.01, 2),
    ),
    min_size=1,
    max_size=30,
)
"""For `policy_parts.conform`: small, and with every target there is."""
