"""Whether a scheduling policy keeps what `Policy` promises: run it on yours.

    python -m scalellm_plugins.testing.conformance my_package:MyPolicy

or in a test:

    from scalellm_plugins.testing.conformance import check_policy

    def test_it_is_a_policy():
        check_policy(MyPolicy)

The policy is hosted in virtual time under random workloads: tenants, classes, targets, prefixes in
the cache, too few seats or KV blocks, clients that leave. Every call is looked at.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence

from scalellm_plugins.config import SchedulerConfig
from scalellm_plugins.errors import ConfigError
from scalellm_plugins.scheduling.policy import Engine, Policy, Stack

from .promises import BrokenPromise, Checked, contents, keep
from .virtual_host import VirtualHost, engine, random_work

__all__ = ["BrokenPromise", "check_policy", "main"]

SEEDS = range(12)
STEPS = 80
"""In which work arrives."""

_HOSTS: tuple[dict[str, int], ...] = (
    {},
    {"seats": 1},
    {"seats": 8, "blocks": 14},
    {"seats": 3, "blocks": 20, "step_tokens": 200},
)
"""Engines that are short of nothing, of seats, and of KV blocks."""

_OPTIONED = (
    ("gives_up", "hopeless"),
    ("paces", "step_s"),
    ("preempts", "victim"),
    ("ranks", "rank"),
    ("yields", "resting"),
)


def check_policy(
    kind: Callable[[Engine, SchedulerConfig], Policy],
    options: SchedulerConfig | None = None,
    seeds: Sequence[int] = SEEDS,
) -> None:
    """Host a policy under random workloads, one per seed.

    Args:
        kind: the class, or whatever makes one of an engine and options.
        options: what `--scalellm.scheduler.*` would be; the defaults if None.
        seeds: of the workloads.

    Raises:
        BrokenPromise: an AssertionError that says which promise was broken, by which call, and
            with which seed it happens again.
    """
    options = options or SchedulerConfig()
    _check_class(kind(engine(), options))
    for seed in seeds:
        try:
            log = _run(kind, options, seed)
            keep("the same happens again", _run(kind, options, seed) == log, "two runs differ")
        except BrokenPromise as broken:
            raise BrokenPromise(f"{broken} (seed {seed})") from broken.__cause__
    _check_growth(kind, options)


def _check_class(policy: Policy) -> None:
    """What can be seen without running it."""
    keep(
        "a Policy", isinstance(policy, Policy), f"{type(policy).__name__} does not inherit from it"
    )
    text = policy.name if isinstance(policy.name, str) else ""
    keep("name is a word", isinstance(policy, Stack) or text.isidentifier(), repr(policy.name))
    kinds = type(policy).__mro__
    below = [vars(policy), *map(vars, kinds[: kinds.index(Policy)])]
    for flag, method in _OPTIONED:
        overridden = any(method in names for names in below)
        keep(
            f"{flag} says whether {method} is asked",
            not overridden or any(flag in names for names in below),
            f"{method} is there and is never called: set {flag} = True",
        )


def _run(
    kind: Callable[[Engine, SchedulerConfig], Policy],
    options: SchedulerConfig,
    seed: int,
    steps: int = STEPS,
) -> list[tuple[str, str]]:
    """One workload from its first arrival until nothing is left; return what happened."""
    chance = random.Random(seed)
    made = kind(engine(**_HOSTS[seed % len(_HOSTS)]), options)
    checked = Checked(made)
    host = VirtualHost(checked)
    rate = chance.choice([0.1, 0.5, 2.0])
    capacity = made.engine.blocks * made.engine.block_tokens
    names: list[str] = []
    for _ in range(steps):
        while chance.random() < rate / (1 + rate):
            names.append(f"request-{seed}-{len(names)}")
            work = random_work(chance, names[-1], capacity)
            work.due = chance.choice([None, None, host.now + chance.uniform(0.1, 10.0)])
            host.arrive(work)
        if chance.random() < 0.05 and (works := host.works()):
            host.abort(chance.choice(works))
        host.step()
    _drain(host)
    keep("everything ends", host.over.keys() == set(names), "some work was lost")
    _check_forgotten(made, set(names))
    return host.log


def _drain(host: VirtualHost) -> None:
    """Step until all is done. A step for each token is what it takes at the most; twice is too
    long, whoever was preempted how often."""
    left = sum(work.prompt + work.most for work in host.works())
    for _ in range(100 + 2 * left):
        if not host.works():
            return
        host.step()
    stuck = [work.id for work in host.works()]
    keep("everything ends", False, f"nothing arrives any more, and {stuck[:5]} never end")


def _check_forgotten(policy: Policy, names: set[str]) -> None:
    works, texts, _ = contents(policy)
    keep("nothing is kept of ended work", not works, f"it still has {works[:3]}")
    kept = sorted(names & texts)
    keep("nothing is kept of ended work", not kept, f"it still has the ids {kept[:3]}")


def _check_growth(
    kind: Callable[[Engine, SchedulerConfig], Policy], options: SchedulerConfig
) -> None:
    """Its memory is bounded: ten times the work leaves no more behind."""
    sizes = []
    for steps in (STEPS, 10 * STEPS):
        chance = random.Random(0)
        policy = kind(engine(), options)
        host = VirtualHost(policy)
        for number in range(steps):
            host.arrive(random_work(chance, f"request-{number}", 1000))
            host.step()
        _drain(host)
        sizes.append(contents(policy)[2])
    keep(
        "its memory is bounded",
        sizes[1] <= sizes[0] + STEPS,
        f"{sizes[0]} values are left of {STEPS} requests, {sizes[1]} of {10 * STEPS}",
    )


# Command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the policies named on the command line; return how many do not conform."""
    from scalellm_plugins.scheduling.registry import load

    parser = argparse.ArgumentParser(
        prog="python -m scalellm_plugins.testing.conformance",
        description="Check that scheduling policies keep what Policy promises.",
    )
    parser.add_argument("policies", nargs="+", metavar="MODULE:CLASS")
    failed = 0
    for name in parser.parse_args(arguments).policies:
        try:
            check_policy(load(name))
        except (BrokenPromise, ConfigError) as error:
            failed += 1
            print(f"{name}: {error}")
            continue
        print(f"{name}: conforms ({len(SEEDS)} workloads)")
        heavy = sorted({"vllm", "torch"} & sys.modules.keys())
        if heavy:
            print(f"{name}: note: importing it imports {' and '.join(heavy)}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
