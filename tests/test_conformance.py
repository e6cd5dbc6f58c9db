"""The conformance test finds each promise that is broken, and passes what keeps them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from scalellm_plugins.errors import ConfigError
from scalellm_plugins.scheduling.policy import Policy, Verdict, Work
from scalellm_plugins.testing import conformance
from scalellm_plugins.testing.conformance import BrokenPromise, check_policy
from scalellm_plugins.testing.promises import contents, snapshot
from scalellm_plugins.testing.virtual_host import VirtualHost, engine

EXAMPLE = Path(__file__).parents[1] / "examples" / "policies"


def test_first_come_first_served_conforms() -> None:
    check_policy(Policy)


class Everything(Policy):
    """One that does all that a policy may do."""

    name = "everything"
    preempts = ranks = gives_up = yields = True

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.late: dict[str, int] = {}

    def group(self, work: Work) -> Hashable:
        return work.demoted, work.tenant

    def order(self, work: Work) -> Any:
        return work.prompt

    def first(self, heads: Mapping[Hashable, Work], now: float) -> Hashable:
        return min(heads, key=lambda group: (heads[group].demoted, heads[group].arrival))

    def victim(self, work: Work, running: Sequence[Work], now: float) -> Work | None:
        lower = [one for one in running if one.priority > work.priority]
        return lower[-1] if lower else None

    def preempted(self, work: Work, now: float) -> None:
        self.late[work.id] = self.late.get(work.id, 0) + 1

    def ended(self, work: Work, now: float) -> None:
        self.late.pop(work.id, None)

    def rank(self, work: Work, now: float) -> Any:
        return work.priority, work.arrival

    def hopeless(self, work: Work, now: float) -> Verdict | None:
        if work.due is None or now < work.due:
            return None
        return Verdict(message="too late", drop=work.tenant == "a")

    def resting(self, running: Sequence[Work], now: float) -> Collection[Work]:
        return [one for one in running if one.made % 3 == 2 and one is not running[0]]


WATCHED = ("preempted", "withdrawn", "emptied", "victim", "hopeless", "resting", "rank")


def test_one_that_does_everything_conforms_and_is_asked_for_it() -> None:
    """Not vacuous: the workloads have preemption, verdicts of both kinds, rest and withdrawal."""
    seen: set[tuple[str, bool]] = set()

    def watched(method: str) -> Any:
        def told(self: Everything, *given: Any) -> Any:
            found = getattr(Everything, method)(self, *given)
            seen.add((method, bool(found)))
            if isinstance(found, Verdict):
                seen.add(("drop", found.drop))
            return found

        return told

    check_policy(type("Watched", (Everything,), {name: watched(name) for name in WATCHED}))
    for method in ("preempted", "withdrawn", "emptied"):
        assert (method, False) in seen, method
    for method in ("victim", "hopeless", "resting", "drop"):
        assert {(method, True), (method, False)} <= seen, method


# Each of these breaks one promise.


class WrongKey(Policy):
    def first(self, heads: Mapping[Hashable, Work], now: float) -> Hashable:
        return "nobody"


class Counts(Policy):
    asked = 0

    def first(self, heads: Mapping[Hashable, Work], now: float) -> Hashable:
        self.asked += 1
        return super().first(heads, now)


class Fickle(Policy):
    turn = False

    def admitted(self, work: Work, now: float) -> None:
        self.turn = not self.turn

    def order(self, work: Work) -> Any:
        return self.turn


class Wanders(Policy):
    def group(self, work: Work) -> Hashable:
        return work.preemptions + len(self.__dict__.setdefault("seen", []))

    def admitted(self, work: Work, now: float) -> None:
        self.seen.append(0)


class Unordered(Policy):
    def order(self, work: Work) -> Any:
        return float("nan")


class Unhashable(Policy):
    def group(self, work: Work) -> Any:
        return [work.tenant]


class Writes(Policy):
    def first(self, heads: Mapping[Hashable, Work], now: float) -> Hashable:
        found = super().first(heads, now)
        heads[found].priority += 1
        return found


class Sleeps(Policy):
    yields = True

    def resting(self, running: Sequence[Work], now: float) -> Collection[Work]:
        return running


class RestsOthers(Policy):
    yields = True

    def resting(self, running: Sequence[Work], now: float) -> Collection[Work]:
        return [Work("somebody else")]


class Outsider(Policy):
    preempts = True

    def victim(self, work: Work, running: Sequence[Work], now: float) -> Work | None:
        return work


class Thrashes(Policy):
    """Whoever waits is better than whoever runs."""

    preempts = True

    def victim(self, work: Work, running: Sequence[Work], now: float) -> Work | None:
        return running[0]


class Silent(Policy):
    gives_up = True

    def hopeless(self, work: Work, now: float) -> Verdict | None:
        return Verdict(message=" ")


class Backwards(Policy):
    paces = True

    def step_s(self, running: Sequence[Work], now: float) -> float | None:
        return running[0].arrival - now


class Unpaced(Policy):
    def step_s(self, running: Sequence[Work], now: float) -> float | None:
        return 0.1


class Unasked(Policy):
    def victim(self, work: Work, running: Sequence[Work], now: float) -> Work | None:
        return None


class Remembers(Policy):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.known: list[Work] = []

    def arrived(self, work: Work, waiting: Collection[Hashable], now: float) -> None:
        self.known.append(work)


class RemembersIds(Policy):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.known: dict[str, float] = {}

    def admitted(self, work: Work, now: float) -> None:
        self.known[work.id] = now

    def preempted(self, work: Work, now: float) -> None:
        del self.known[work.id]


class Grows(Policy):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.times: list[float] = []

    def admitted(self, work: Work, now: float) -> None:
        self.times.append(now)


class Fails(Policy):
    def ended(self, work: Work, now: float) -> None:
        raise KeyError(work.id)


class Guesses(Policy):
    salt = 0

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        Guesses.salt += 1

    def order(self, work: Work) -> Any:
        return hash((work.id, self.salt))


class NoPolicy:
    def __init__(self, *given: Any) -> None: ...


class TwoWords(Policy):
    name = "two words"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (WrongKey, "first returns one of the heads' groups. Found: 'nobody' \\(seed 0\\)"),
        (Counts, "first changes no state"),
        (Fickle, "group and order stay"),
        (Wanders, "group and order stay"),
        (Unordered, "order compares with itself"),
        (Unhashable, "group is hashable"),
        (Writes, "first leaves work as it is"),
        (Sleeps, "never all of them rest"),
        (RestsOthers, "resting are some of those that run"),
        (Outsider, "victim is one of those that run"),
        (Thrashes, "everything ends"),
        (Silent, "who drops work says why"),
        (Backwards, "step_s is a time or None. Found: -"),
        (Unasked, "set preempts = True"),
        (Unpaced, "set paces = True"),
        (Remembers, "nothing is kept of ended work. Found: it still has \\[Work"),
        (RemembersIds, "nothing is kept of ended work. Found: it still has the ids"),
        (Grows, "its memory is bounded"),
        (Fails, "ended raises nothing. Found: KeyError"),
        (Guesses, "the same happens again"),
        (NoPolicy, "a Policy"),
        (TwoWords, "name is a word. Found: 'two words'"),
    ],
)
def test_a_broken_promise_is_found_and_named(kind: Any, said: str) -> None:
    with pytest.raises(BrokenPromise, match=said):
        check_policy(kind)


# The parts


def test_a_snapshot_sees_what_changes() -> None:
    policy = Everything(engine(), conformance.SchedulerConfig())
    before = snapshot(policy)
    assert snapshot(policy) == before
    policy.late["x"] = 1
    assert snapshot(policy) != before
    work = Work("x")
    before = snapshot((work,))
    work.made = 1
    assert snapshot((work,)) != before
    policy.late["self"] = policy  # type: ignore[assignment]
    assert snapshot(policy), "a circle is no trap"


def test_what_is_held_is_found_however_deep() -> None:
    policy = Policy(engine(), conformance.SchedulerConfig())
    inside = Work("deep", prompt=3)
    policy.__dict__["kept"] = {("a", frozenset({"b"})): [{"c": (inside,)}]}
    works, texts, _ = contents(policy)
    assert works == [inside]
    assert {"a", "b", "c"} <= texts


def test_the_host_gives_seats_blocks_and_tokens_only_once() -> None:
    made = engine(seats=2, blocks=6, block_tokens=10, step_tokens=16)
    host = VirtualHost(Policy(made, conformance.SchedulerConfig()))
    works = [Work(str(number), prompt=20, most=15) for number in range(4)]
    for work in works:
        host.arrive(work)
    for _ in range(200):
        host.step()
        assert len(host.running) <= 2
        assert sum(-(-one.computed // 10) for one in host.running) <= 6
    assert set(host.over.values()) == {"done"}
    assert [work.made for work in works] == [15] * 4
    assert any(what == "preempted" for what, _ in host.log), "35 tokens each, 60 in all"


# The command, and the example


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location(
        "shortest_prompt_first", EXAMPLE / "shortest_prompt_first.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_conforms_and_does_what_it_says() -> None:
    module = load_example()
    kind = module.ShortestPromptFirst
    check_policy(kind)
    policy = kind(engine(), conformance.SchedulerConfig())
    long, short = Work("long", prompt=500), Work("short", prompt=5, arrival=1.0)
    heads = {policy.group(work): work for work in (long, short)}
    assert heads[policy.first(heads, 2.0)] is short
    assert heads[policy.first(heads, module.PATIENCE_S + 0.1)] is long


def test_the_example_is_a_package_with_an_entry_point_and_short() -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["scalellm.policies"]
    (target,) = points.values()
    module, _, name = target.partition(":")
    assert [module] == project["tool"]["setuptools"]["py-modules"]
    assert list(points) == [getattr(load_example(), name).name]
    assert target in (EXAMPLE / "README.md").read_text()
    lines = (EXAMPLE / f"{module}.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 30


def test_the_command_says_who_conforms(capsys: pytest.CaptureFixture[str]) -> None:
    fair = "scalellm_plugins.scheduling.fair:Fair"
    assert conformance.main([fair]) == 0
    assert f"{fair}: conforms" in capsys.readouterr().out
    assert conformance.main(["nowhere:Policy", fair]) == 1
    assert "'nowhere:Policy' cannot be loaded" in capsys.readouterr().out


def test_the_command_as_it_is_documented() -> None:
    command = [sys.executable, "-m", "scalellm_plugins.testing.conformance"]
    result = subprocess.run(
        [*command, "shortest_prompt_first:ShortestPromptFirst"],
        cwd=EXAMPLE,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("conforms") == 1


def test_what_the_options_forbid_is_an_error_of_the_options() -> None:
    class Refuses(Policy):
        def __init__(self, *given: Any) -> None:
            raise ConfigError("not with me")

    with pytest.raises(ConfigError, match="not with me"):
        check_policy(Refuses)
