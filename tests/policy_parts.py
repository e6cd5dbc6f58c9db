"""An engine in virtual time for tests of policies: a policy's host without vLLM.

It does what the scheduler's host does: seats, KV blocks, chunked prefill, running work before
waiting work, preemption by recomputation. Steps take what the roofline says, so an hour of traffic
is seconds. What `policy.py` demands of a policy is asserted on the way:

    run = VirtualHost(make(MyPolicy, engine(seats=8), ageing_s=5)).run(asks)
    run.attained(lambda one: one.ask.tenant == "acme")

`conform` is all of it for one policy, to be given what `policy_asks.workloads` makes up.
"""

from __future__ import annotations

import heapq
import pickle
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from scalellm_plugins.config import SchedulerConfig
from scalellm_plugins.scheduling.budget import PrefillBudget
from scalellm_plugins.scheduling.policy import Engine, Policy, Work
from scalellm_plugins.scheduling.step_times import StepTimes
from scalellm_plugins.simulator.roofline import Roofline, gpu_preset, model_preset

from .policy_asks import Ask, Outcome

H200 = Roofline(gpu_preset("h200"), model_preset("8b"))


class Budget(Protocol):
    """As `PrefillBudget`."""

    def tokens(self, decodes: int, context: int, now: float, target_s: float | None = None) -> int:
        """How many prompt tokens the next step may take."""


@dataclass
class Run:
    """What came out."""

    outcomes: list[Outcome]
    seconds: float
    steps: int
    preemptions: int
    rests: int
    """Turns that running work sat out."""

    def attained(self, ours: Callable[[Outcome], bool] = lambda _: True) -> float:
        """Share of the requests that finished within their targets, 0-1."""
        some = [one for one in self.outcomes if ours(one)]
        return sum(one.met for one in some) / len(some)


def engine(
    seats: int = 64, step_tokens: int = 2048, blocks: int = 20_000, block_tokens: int = 16
) -> Engine:
    """An engine whose step times are still to be learnt."""
    return Engine(
        seats=seats,
        step_tokens=step_tokens,
        blocks=blocks,
        block_tokens=block_tokens,
        times=StepTimes(),
    )


def make(kind: type[Policy], of: Engine | None = None, **options: Any) -> Policy:
    """A policy with the options that are given."""
    return kind(of or engine(), SchedulerConfig(**options))


class Queue:
    """Waiting work: groups, sorted within. Holds the policy to what it may not change."""

    def __init__(self, policy: Policy, strict: bool) -> None:
        self._policy = policy
        self._strict = strict
        self.groups: dict[Hashable, list[tuple[Any, float, int, Work]]] = {}
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self.groups.values()))

    def __iter__(self) -> Iterator[Work]:
        return (entry[-1] for group in self.groups.values() for entry in group)

    def push(self, work: Work) -> None:
        """Add work; it keeps its place among equals when it comes back."""
        number = self._numbers.setdefault(work.id, len(self._numbers))
        entry = (self._policy.order(work), work.arrival, number, work)
        heapq.heappush(self.groups.setdefault(self._policy.group(work), []), entry)

    def heads(self) -> dict[Hashable, Work]:
        """Each group's first."""
        return {group: entries[0][-1] for group, entries in self.groups.items()}

    def next(self, now: float) -> Work:
        """Whose turn it is."""
        heads = self.heads()
        before = pickle.dumps(vars(self._policy)) if self._strict else b""
        group = self._policy.first(heads, now)
        assert group in heads, f"{group!r} is no group that waits"
        if self._strict:
            assert pickle.dumps(vars(self._policy)) == before, "`first` changed the policy's state"
        return heads[group]

    def pop(self, work: Work) -> None:
        """Take out the first of a group."""
        group = self._policy.group(work)
        order, *_, found = heapq.heappop(self.groups[group])
        assert found is work, f"the group of {work} changed while it waited"
        assert order == self._policy.order(work), f"the order of {work} changed while it waited"
        if not self.groups[group]:
            del self.groups[group]
            self._policy.emptied(group)


@dataclass
class VirtualHost:
    """Runs requests under a policy until all of them have ended."""

    policy: Policy
    roofline: Roofline = H200
    budget: Budget | None = None
    noise: float = 0.0
    """Standard deviation of the logarithm of what steps take beside the roofline."""
    seed: int = 0
    slowdown: Callable[[float], float] = lambda now: 1.0
    """Of the machine at a time."""
    watch: Callable[[VirtualHost], None] | None = None
    """Called before every step."""
    strict: bool = False
    """Whether the policy's state is compared before and after what must not change it: slow."""
    now: float = 0.0
    running: list[Work] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = self.policy.engine
        if self.budget is None and self.policy.paces:
            self.budget = PrefillBudget(None, self.engine)
        self.queue = Queue(self.policy, self.strict)
        self.free = self.engine.blocks
        self._held: dict[str, int] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._random = random.Random(self.seed)
        self._run = Run([], 0.0, 0, 0, 0)

    def run(self, asks: Iterable[Ask]) -> Run:
        """Serve the requests.

        Raises:
            AssertionError: the policy did what it must not, or nothing while work was there.
        """
        coming = sorted(asks, key=lambda ask: ask.at)
        coming.reverse()
        while coming or self.queue.groups or self.running:
            while coming and coming[-1].at <= self.now:
                self._arrive(coming.pop())
            self._give_up()
            if not self.queue.groups and not self.running:
                self.now = max(self.now, coming[-1].at) if coming else self.now
                continue
            if self.watch is not None:
                self.watch(self)
            self._step()
        self._run.outcomes = list(self._outcomes.values())
        self._run.seconds = self.now
        return self._run

    # What waits

    def _arrive(self, ask: Ask) -> None:
        work = ask.work(len(self._outcomes))
        assert self._blocks(ask.prompt + ask.output) <= self.engine.blocks, "never fits"
        self._outcomes[work.id] = Outcome(ask, work)
        self.policy.arrived(work, self.queue.groups.keys(), self.now)
        self.queue.push(work)

    def _give_up(self) -> None:
        """Ask of each group's first, and of who is first then, whether it is hopeless."""
        if not self.policy.gives_up:
            return
        asked: set[str] = set()
        while todo := [work for work in self.queue.heads().values() if work.id not in asked]:
            for work in todo:
                asked.add(work.id)
                verdict = self.policy.hopeless(work, self.now)
                if verdict is None:
                    continue
                assert verdict.message, f"{work} is given up without a word"
                self.queue.pop(work)
                if verdict.drop:
                    self._outcomes[work.id].error = verdict.message
                    self.policy.ended(work, self.now)
                else:
                    work.demoted = True
                    self.queue.push(work)

    def _admit(self, prefill: int, tokens: int) -> list[tuple[Work, int]]:
        """Let work in while there are seats, tokens and blocks."""
        chunks = []
        while self.queue.groups and len(self.running) < self.engine.seats:
            left = min(prefill, tokens)
            if left <= 0:
                break
            self.policy.account(self.running, self.now)
            work = self.queue.next(self.now)
            self.queue.pop(work)
            work.since = self.now
            self.policy.admitted(work, self.now)
            count = min(left, work.prompt + work.made)
            if not self._hold(work, count):
                work.since = None
                self.policy.withdrawn(work, self.now)
                self.queue.push(work)
                break
            self._outcomes[work.id].starts += 1
            self.running.append(work)
            chunks.append((work, count))
            prefill -= count
            tokens -= count
        return chunks

    def _make_room(self) -> None:
        """Ask who gives way to the one whose turn it is."""
        if not (self.policy.preempts and self.queue.groups and self.running):
            return
        self.policy.account(self.running, self.now)
        work = self.queue.next(self.now)
        going: list[Work] = []
        need = self._blocks(min(work.prompt + work.made, self.engine.step_tokens))
        while (
            len(self.running) - len(going) >= self.engine.seats
            or self.free + sum(self._held[one.id] for one in going) < need
        ):
            rest = [one for one in self.running if one not in going]
            victim = self.policy.victim(work, rest, self.now) if rest else None
            if victim is None:
                return
            assert victim in rest, f"{victim} does not run"
            going.append(victim)
        for one in going:
            self._preempt(one)

    # What runs

    def _step(self) -> None:
        self._make_room()
        rest = self._resting()
        decodes = [w for w in self.running if self._todo(w) == 1 and w not in rest]
        context = sum(work.computed for work in decodes)
        prefill = self.engine.step_tokens
        if self.budget is not None:
            target = self.policy.step_s(self.running, self.now) if self.policy.paces else None
            prefill = self.budget.tokens(len(decodes), context, self.now, target)
            assert 0 < prefill <= self.engine.step_tokens
        chunks: list[tuple[Work, int]] = []
        tokens = self.engine.step_tokens
        preempted = self._run.preemptions
        for work in list(self.running):
            if work in rest or work.since is None:
                continue
            todo = self._todo(work)
            count = min(todo, tokens) if todo == 1 else min(todo, tokens, prefill)
            if not count or not self._hold_or_preempt(work, count):
                continue
            chunks.append((work, count))
            tokens -= count
            prefill -= 0 if todo == 1 else count
        chunks = [(work, count) for work, count in chunks if work.since is not None]
        if preempted == self._run.preemptions:
            chunks += self._admit(prefill, tokens)
        assert chunks, "work is there, and nothing is done"
        self._execute(chunks)

    def _resting(self) -> set[Work]:
        if not self.policy.yields or not self.running:
            return set()
        rest = set(self.policy.resting(self.running, self.now))
        assert rest <= set(self.running), f"{rest} do not run"
        assert len(rest) < len(self.running), "all rest"
        self._run.rests += len(rest)
        return rest

    def _execute(self, chunks: Sequence[tuple[Work, int]]) -> None:
        prefill = decodes = context = pairs = rows = 0
        for work, count in chunks:
            context += work.computed + count
            if self._todo(work) == 1:
                decodes += 1
                continue
            prefill += count
            pairs += work.computed * count + count * (count + 1) // 2
            rows += count == self._todo(work)
        seconds = self.roofline.step_seconds(
            prefill, decodes, context, prefill_pairs=pairs, prefill_rows=rows
        )
        seconds *= self.slowdown(self.now) * self._random.lognormvariate(0, self.noise)
        self.engine.times.observe(prefill, decodes, context, seconds)
        self.now += seconds
        self._run.steps += 1
        for work, count in chunks:
            done = count == self._todo(work)
            work.computed += count
            if done:
                work.made += 1
                work.first = self.now if work.first is None else work.first
                outcome = self._outcomes[work.id]
                if work.made == outcome.ask.output:
                    outcome.finished = self.now
                    self._leave(work)
                    self.policy.ended(work, self.now)

    @staticmethod
    def _todo(work: Work) -> int:
        """Tokens to compute until its next one is made."""
        return work.prompt + work.made - work.computed

    # Blocks

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.engine.block_tokens)

    def _hold(self, work: Work, count: int) -> bool:
        """Take the blocks that so many tokens more need; whether they are there."""
        more = self._blocks(work.computed + count) - self._held.get(work.id, 0)
        if more > self.free:
            return False
        self.free -= more
        self._held[work.id] = self._held.get(work.id, 0) + more
        return True

    def _hold_or_preempt(self, work: Work, count: int) -> bool:
        while not self._hold(work, count):
            last = self.running[-1]
            if self.policy.ranks:
                # Of equals the last one, as without ranks.
                last = max(reversed(self.running), key=lambda one: self.policy.rank(one, self.now))
            self._preempt(last)
            if last is work:
                return False
        return True

    def _leave(self, work: Work) -> None:
        self.policy.account([work], self.now)
        self.running.remove(work)
        self.free += self._held.pop(work.id, 0)

    def _preempt(self, work: Work) -> None:
        self._leave(work)
        work.since = None
        work.computed = 0
        work.preemptions += 1
        self._run.preemptions += 1
        self.policy.preempted(work, self.now)
        self.queue.push(work)


def sustainable(
    ask: Callable[[random.Random, float], Ask], of: Callable[[], Engine] = engine, count: int = 600
) -> float:
    """Requests per s that the engine serves when there are always more: first come, first served,
    without those of the beginning and the end, when seats are not full."""
    chance = random.Random(1)
    run = VirtualHost(make(Policy, of())).run([ask(chance, 0.0) for _ in range(count)])
    ends = sorted(one.finished or 0.0 for one in run.outcomes)
    low, high = count // 5, count * 4 // 5
    return (high - low) / (ends[high] - ends[low])


def conform(kind: type[Policy], asks: Sequence[Ask], **options: Any) -> Run:
    """Run requests on an engine so small that everything happens, and check what came of it.

    Raises:
        AssertionError: the policy did what it must not, or a request did not end as it should.
    """
    of = engine(seats=4, step_tokens=64, blocks=24)
    run = VirtualHost(make(kind, of, **options), strict=True).run(asks)
    assert len(run.outcomes) == len(asks)
    for one in run.outcomes:
        assert (one.finished is None) == bool(one.error), f"{one.work} has not ended"
        assert one.error or one.work.made == one.ask.output
    return run
