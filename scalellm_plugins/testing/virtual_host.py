"""A host of policies in virtual time: seats, KV blocks and steps, no model and no vLLM.

It does to a policy what the engine's does, in the same order, with all that can happen to a
request: it waits, runs, is put back, preempted, given up, aborted, ends.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Hashable
from itertools import count
from typing import Any

from scalellm_plugins.scheduling.policy import Engine, Policy, Work
from scalellm_plugins.scheduling.step_times import StepTimes


def engine(
    *, seats: int = 4, step_tokens: int = 64, blocks: int = 1000, block_tokens: int = 16
) -> Engine:
    """Return an engine that knows nothing yet of its steps."""
    return Engine(
        seats=seats,
        step_tokens=step_tokens,
        blocks=blocks,
        block_tokens=block_tokens,
        times=StepTimes(),
    )


class VirtualHost:
    """Waiting and running work under one policy. A step takes `step_s` seconds of its clock."""

    def __init__(self, policy: Policy, *, step_s: float = 0.02) -> None:
        self.policy = policy
        self.engine = policy.engine
        self.now = 0.0
        self.step_s = step_s
        self.running: list[Work] = []
        self.waiting: dict[Hashable, list[tuple[Any, int, Work]]] = {}
        """Group → (order, number of arrival, work), sorted."""
        self.over: dict[str, str] = {}
        """Work that has ended, by id, and how: "done", "aborted" or the message of a verdict."""
        self.log: list[tuple[str, str]] = []
        """(what happened, id), in order."""
        self._numbers: dict[str, int] = {}
        self._count = count()

    # Requests

    def arrive(self, work: Work) -> None:
        """Work comes to wait."""
        work.arrival = self.now
        self._numbers[work.id] = next(self._count)
        self.policy.arrived(work, self.waiting.keys(), self.now)
        self._enqueue(work)

    def abort(self, work: Work) -> None:
        """Its client went away; nothing happens if it is over."""
        if work.id not in self.over:
            self._leave(work)
            self._end(work, "aborted")

    def works(self) -> list[Work]:
        """All that is not over."""
        return [*self.running, *(work for queue in self.waiting.values() for *_, work in queue)]

    # A step

    def step(self) -> None:
        """Give up, admit, and let what runs have its tokens."""
        self._give_up()
        self._admit()
        rests = self.policy.yields and self.running
        resting = set(self.policy.resting(tuple(self.running), self.now)) if rests else set()
        if self.policy.paces and self.running:
            self.policy.step_s(tuple(self.running), self.now)  # its steps are of one length
        prefill = self._work([work for work in self.running if work not in resting])
        context = sum(work.computed for work in self.running)
        self.engine.times.observe(prefill, len(self.running), context, self.step_s)
        self.now += self.step_s

    def _give_up(self) -> None:
        if not self.policy.gives_up:
            return
        for work in [work for queue in self.waiting.values() for *_, work in queue]:
            if work.demoted:
                continue
            verdict = self.policy.hopeless(work, self.now)
            if verdict is None:
                continue
            self._dequeue(work)
            if verdict.drop:
                self._end(work, verdict.message)
            else:
                work.demoted = True
                self._enqueue(work)

    def _admit(self) -> None:
        # Whoever was admitted in this step may be preempted in it, but not forever.
        for _ in range(4 * self.engine.seats):
            if not self.waiting:
                return
            self.policy.account(tuple(self.running), self.now)
            heads = {group: queue[0][2] for group, queue in self.waiting.items()}
            work = heads[self.policy.first(heads, self.now)]
            gone = self._who_makes_room(work)
            if gone is None:
                # As vLLM does: it is taken out, finds no blocks, and is put back.
                self._dequeue(work)
                self.policy.admitted(work, self.now)
                self.policy.withdrawn(work, self.now)
                self._enqueue(work)
                return
            for one in gone:
                self._preempt(one)
            self._dequeue(work)
            work.since = self.now
            work.computed = min(work.cached, work.prompt - 1)
            self.running.append(work)
            self.log.append(("admitted", work.id))
            self.policy.admitted(work, self.now)

    def _who_makes_room(self, work: Work) -> list[Work] | None:
        """Who has to go so that work can run; None: that cannot be."""
        rest = list(self.running)
        gone: list[Work] = []
        while len(rest) >= self.engine.seats or self._free(rest) < self._blocks(_known(work) + 1):
            if not self.policy.preempts or not rest:
                return None
            victim = self.policy.victim(work, tuple(rest), self.now)
            if victim is None:
                return None
            rest.remove(victim)
            gone.append(victim)
        return gone

    def _work(self, awake: list[Work]) -> int:
        """Give tokens to whoever is awake; return how many of them were prompts'."""
        budget = self.engine.step_tokens
        prefill = 0
        for work in awake:
            if work not in self.running:
                continue  # preempted by one before it
            tokens = min(budget, _known(work) - work.computed)
            if tokens <= 0 or not self._grow(work, tokens):
                continue
            budget -= tokens
            work.computed += tokens
            prefill += tokens if tokens > 1 else 0
            if work.computed == _known(work):
                self._make(work)
        return prefill

    def _make(self, work: Work) -> None:
        work.made += 1
        if work.first is None:
            work.first = self.now + self.step_s
        if work.made >= work.most:
            self.policy.account((work,), self.now)
            self.running.remove(work)
            self._end(work, "done")

    def _grow(self, work: Work, tokens: int) -> bool:
        """Make room for more tokens of running work; False: it had to go itself."""
        more = self._blocks(work.computed + tokens) - self._blocks(work.computed)
        while self._free(self.running) < more:
            last = self.running[-1]
            if self.policy.ranks:
                last = max(self.running, key=lambda one: self.policy.rank(one, self.now))
            self._preempt(last)
            if last is work:
                return False
        return True

    # What both share

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.engine.block_tokens)

    def _free(self, running: list[Work]) -> int:
        return self.engine.blocks - sum(self._blocks(work.computed) for work in running)

    def _preempt(self, work: Work) -> None:
        self.running.remove(work)
        self.policy.account((work,), self.now)
        work.since = None
        work.computed = 0
        work.preemptions += 1
        self.log.append(("preempted", work.id))
        self.policy.preempted(work, self.now)
        self._enqueue(work)

    def _enqueue(self, work: Work) -> None:
        place = (self.policy.order(work), self._numbers[work.id], work)
        queue = self.waiting.setdefault(self.policy.group(work), [])
        bisect.insort(queue, place, key=lambda entry: entry[:2])

    def _dequeue(self, work: Work) -> None:
        for group, queue in self.waiting.items():
            for place, entry in enumerate(queue):
                if entry[2] is work:
                    del queue[place]
                    if not queue:
                        del self.waiting[group]
                        self.policy.emptied(group)
                    return

    def _leave(self, work: Work) -> None:
        if work in self.running:
            self.policy.account((work,), self.now)
            self.running.remove(work)
        else:
            self._dequeue(work)

    def _end(self, work: Work, how: str) -> None:
        self.over[work.id] = how
        del self._numbers[work.id]
        self.log.append((how, work.id))
        self.policy.ended(work, self.now)


def _known(work: Work) -> int:
    return work.prompt + work.made


# Workloads


def random_work(chance: random.Random, name: str, capacity: int) -> Work:
    """Return work as it may come: any tenant, class and targets; it fits `capacity` tokens."""
    most = chance.randint(1, 20)
    work = Work(name, prompt=chance.randint(1, min(150, capacity - most - 1)), most=most)
    work.tenant = chance.choice("abc")
    work.weight = chance.choice([None, None, 1.0, 4.0])
    work.priority = chance.choice([-1, 0, 0, 0, 1])
    work.cached = chance.choice([0, 0, chance.randint(0, work.prompt)])
    work.ttft = chance.choice([None, chance.uniform(0.02, 5.0)])
    work.tpot = chance.choice([None, chance.uniform(0.01, 0.2)])
    return work
