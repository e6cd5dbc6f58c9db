"""What a scheduling policy is: who is next, who gives way, who rests, who is given up.

A policy ranks `Work` and nothing else: it imports neither vLLM nor torch, reads no clock (`now` is
passed in, s on the engine's monotonic clock) and keeps no requests alive that have ended. It is
hosted by `host.py`, which carries out what it says in vLLM's scheduler, and by anything else that
has waiting and running work: tests, `scalellm simulate`.

Waiting work stands in groups, sorted within; the policy says whose group is next by looking at the
groups' heads. So a step costs it as many looks as there are groups, not as there are requests.
"""

# ruff: noqa: ARG002  (a policy overrides some methods and leaves the others as they are here)

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from scalellm_plugins.config import SchedulerConfig

    from .step_times import StepTimes


class Work:
    """What a policy may know of a request. Times in s on the engine's clock, lengths in tokens."""

    __slots__ = (
        "arrival",
        "cached",
        "charged",
        "computed",
        "demoted",
        "due",
        "first",
        "id",
        "level",
        "line",
        "made",
        "most",
        "paid",
        "preemptions",
        "priority",
        "prompt",
        "since",
        "tenant",
        "tpot",
        "ttft",
        "weight",
    )

    def __init__(self, id_: str, *, arrival: float = 0.0, prompt: int = 1, most: int = 1) -> None:
        self.id = id_
        self.arrival = arrival
        """When it came to the server."""
        self.prompt = prompt
        self.cached = 0
        """Tokens of its prompt in the prefix cache, as last looked up (with `locality_tokens`)."""
        self.most = most
        """How many tokens it may have made at the end (`max_tokens`)."""
        self.tenant = "default"
        self.weight: float | None = None
        """Its tenant's share of the service, if it says one."""
        self.priority = 0
        """Class, as vLLM's: lower is more urgent."""
        self.ttft: float | None = None
        """It should have its first token so long after its arrival."""
        self.tpot: float | None = None
        """And every further one so long after the one before, on average."""
        self.due: float | None = None
        """When it should have ended."""
        self.since: float | None = None
        """When it last began to run; None while it waits."""
        self.first: float | None = None
        """When its first token was made."""
        self.preemptions = 0
        self.demoted = False
        """Whether it was found hopeless, and goes on behind all others."""
        # The policy's own notes.
        self.level = 0
        """Class that it runs in (`priority`)."""
        self.paid = 0
        """Tokens of `made` that were charged for (`fair`)."""
        self.charged: int | None = None
        """Tokens of its prompt that were; None: none yet (`fair`)."""
        self.line = 0
        """Its place among its tenant's, in tokens of prompts that came before it (`fair`)."""
        self.computed = 0
        """Tokens whose KV the engine has."""
        self.made = 0
        """Tokens generated."""

    def __repr__(self) -> str:
        return f"Work({self.id!r}, tenant={self.tenant!r}, priority={self.priority})"


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the engine when a policy is made."""

    seats: int
    """Requests that can run at a time (`--max-num-seqs`)."""
    step_tokens: int
    """Tokens of a step (`--max-num-batched-tokens`)."""
    blocks: int
    """KV blocks there are."""
    block_tokens: int
    """Tokens of a KV block."""
    times: StepTimes
    """How long steps take, learnt as they go by."""


class Verdict(msgspec.Struct, frozen=True):
    """What becomes of work that cannot make it any more."""

    message: str
    """For the client, if it is dropped."""
    drop: bool = True
    """Whether it ends with an error; if not, it is demoted."""


class Policy:
    """Base of all policies: first come, first served. Override what differs.

    The host calls `arrived` … `ended` once for each thing that happens, in this order for one
    request: arrived, admitted (, withdrawn or preempted, admitted)*, ended.
    """

    name: str = "fcfs"

    preempts: bool = False
    """Whether `victim` may ever name one."""
    ranks: bool = False
    """Whether `rank` orders running work; else it stays in the order of admission."""
    gives_up: bool = False
    """Whether `hopeless` may ever find one."""
    yields: bool = False
    """Whether `resting` may ever name one."""
    paces: bool = False
    """Whether `step_s` may ever name a time."""

    def __init__(self, engine: Engine, options: SchedulerConfig) -> None:
        """Prepare for one engine.

        Raises:
            ConfigError: an option has a value that this policy cannot work with.
        """
        self.engine = engine
        self.options = options

    # Who is next

    def group(self, work: Work) -> Hashable:
        """Where work waits. Must not change while it waits, unless `demoted` does."""
        return None

    def order(self, work: Work) -> Any:
        """Sort key within a group, smaller first; of equals, whoever came first.

        Asked after `arrived`; must not change while the work waits, unless `demoted` does.
        """
        return 0

    def first(self, heads: Mapping[Hashable, Work], now: float) -> Hashable:
        """Whose turn it is: a key of `heads`, group → its first. Must not change any state."""
        if len(heads) == 1:
            return next(iter(heads))
        return min(heads, key=lambda group: heads[group].arrival)

    # What happens

    def arrived(self, work: Work, waiting: Collection[Hashable], now: float) -> None:
        """Work comes to wait, for the first time; `waiting`: groups that have some already."""

    def admitted(self, work: Work, now: float) -> None:
        """Work leaves the queue to run."""

    def withdrawn(self, work: Work, now: float) -> None:
        """It could not run after all, and waits again as if it had not been admitted."""

    def preempted(self, work: Work, now: float) -> None:
        """It ran, lost its place, and waits again."""

    def emptied(self, group: Hashable) -> None:
        """Nothing of a group waits any more."""

    def account(self, works: Iterable[Work], now: float) -> None:
        """Take note of what running work has `made` since the last time.

        Called for all of it before a choice between groups, and for work that stops running.
        """

    def ended(self, work: Work, now: float) -> None:
        """Work is over: finished, aborted or given up; it may never have run."""

    # Who gives way

    def victim(self, work: Work, running: Sequence[Work], now: float) -> Work | None:
        """Who of `running` gives way so that `work`, whose turn it is, can run; None: nobody.

        Asked again with the rest of `running` while that does not make enough room. Nobody has to
        go if it would be in vain.
        """
        return None

    def rank(self, work: Work, now: float) -> Any:
        """Sort key of running work; whoever is last is the first to go when KV blocks run out."""
        return 0

    # Deadlines

    def hopeless(self, work: Work, now: float) -> Verdict | None:
        """Whether waiting work cannot make it any more, and what then."""
        return None

    def resting(self, running: Sequence[Work], now: float) -> Collection[Work]:
        """Who of `running` gets no token in this step, for the others' sake. Never all."""
        return ()

    def step_s(self, running: Sequence[Work], now: float) -> float | None:
        """How long this step may take for the sake of those that decode in it, s; None: as long
        as it likes. The host gives prompts fewer tokens (`budget.py`); it may not be enough."""
        return None


class Stack(Policy):
    """Several policies, one within the other: the first decides, of equals the second, and so on.

    Gives up and rests whom any of them does; who gives way is up to the first that preempts.
    """

    def __init__(self, policies: Sequence[Policy]) -> None:
        super().__init__(policies[0].engine, policies[0].options)
        self.policies = tuple(policies)
        self._preempting = [one for one in policies if one.preempts]
        for flag in ("preempts", "ranks", "gives_up", "yields", "paces"):
            setattr(self, flag, any(getattr(one, flag) for one in policies))
        self.name = ",".join(one.name for one in policies)

    def group(self, work: Work) -> Hashable:
        return tuple([one.group(work) for one in self.policies])

    def order(self, work: Work) -> Any:
        return tuple([one.order(work) for one in self.policies])

    def first(self, heads: Mapping[Hashable, Work], now: float) -> Hashable:
        left: dict[Any, Work] = dict(heads)
        for depth, policy in enumerate(self.policies):
            if len(left) == 1:
                break
            # A group of this policy stands for several of the ones within: its oldest speaks.
            oldest: dict[Hashable, Work] = {}
            for group, work in left.items():
                known = oldest.get(group[depth])
                if known is None or work.arrival < known.arrival:
                    oldest[group[depth]] = work
            chosen = policy.first(oldest, now)
            left = {group: work for group, work in left.items() if group[depth] == chosen}
        found: Hashable = min(left, key=lambda group: left[group].arrival)
        return found

    def arrived(self, work: Work, waiting: Collection[Hashable], now: float) -> None:
        for depth, policy in enumerate(self.policies):
            policy.arrived(work, {group[depth] for group in waiting}, now)  # type: ignore[index]

    def admitted(self, work: Work, now: float) -> None:
        for policy in self.policies:
            policy.admitted(work, now)

    def withdrawn(self, work: Work, now: float) -> None:
        for policy in self.policies:
            policy.withdrawn(work, now)

    def preempted(self, work: Work, now: float) -> None:
        for policy in self.policies:
            policy.preempted(work, now)

    def account(self, works: Iterable[Work], now: float) -> None:
        works = list(works)
        for policy in self.policies:
            policy.account(works, now)

    def ended(self, work: Work, now: float) -> None:
        for policy in self.policies:
            policy.ended(work, now)

    def victim(self, work: Work, running: Sequence[Work], now: float) -> Work | None:
        return self._preempting[0].victim(work, running, now) if self._preempting else None

    def rank(self, work: Work, now: float) -> Any:
        return tuple([one.rank(work, now) for one in self.policies])

    def hopeless(self, work: Work, now: float) -> Verdict | None:
        for policy in self.policies:
            if policy.gives_up and (verdict := policy.hopeless(work, now)) is not None:
                return verdict
        return None

    def resting(self, running: Sequence[Work], now: float) -> Collection[Work]:
        rest: set[Work] = set()
        for policy in self.policies:
            if policy.yields:
                rest.update(policy.resting(running, now))
        return rest if len(rest) < len(running) else ()

    def step_s(self, running: Sequence[Work], now: float) -> float | None:
        found = [one.step_s(running, now) for one in self.policies if one.paces]
        return min((seconds for seconds in found if seconds is not None), default=None)
