"""A policy around a policy, which looks for broken promises in every answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence, Set
from typing import Any

from scalellm_plugins.scheduling.policy import Policy, Verdict, Work


class BrokenPromise(AssertionError):
    """A policy did what a policy must not do."""


def keep(promise: str, kept: bool, found: str) -> None:
    """Raise `BrokenPromise` if a promise was not kept."""
    if not kept:
        raise BrokenPromise(f"broken: {promise}. Found: {found}")


class Checked(Policy):
    """Says whatever the policy within says, once it has been checked."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.engine, policy.options)
        self.within = policy
        self.name = policy.name
        self.preempts, self.ranks = policy.preempts, policy.ranks
        self.gives_up, self.yields, self.paces = policy.gives_up, policy.yields, policy.paces
        self._questions = 0
        self._places: dict[str, tuple[bool, Hashable, Any]] = {}
        """Where work waits: whether it was demoted, its group and its order."""

    # Who is next

    def group(self, work: Work) -> Hashable:
        group: Hashable = self._asked("group", work)
        keep("group is hashable", _hashable(group), repr(group))
        return group

    def order(self, work: Work) -> Any:
        found = self._asked("order", work)
        keep("order compares with itself", _ordered(found), repr(found))
        place = (work.demoted, self.group(work), found)
        known = self._places.setdefault(work.id, place)
        if known != place:
            keep("group and order stay while work waits", known[0] != work.demoted, repr(place))
            self._places[work.id] = place
        return found

    def first(self, heads: Mapping[Hashable, Work], now: float) -> Hashable:
        for group, work in heads.items():
            place = (work.demoted, self.group(work), self._asked("order", work))
            keep(
                "group and order stay while work waits", self._places[work.id] == place, repr(place)
            )
            assert group == place[1]
        found: Hashable = self._asked("first", dict(heads), now)
        keep("first returns one of the heads' groups", found in heads, repr(found))
        again: Hashable = self._asked("first", dict(heads), now)
        keep("first says the same when it is asked again", again == found, f"{found!r}, {again!r}")
        return found

    # What happens

    def arrived(self, work: Work, waiting: Collection[Hashable], now: float) -> None:
        self._told("arrived", work, waiting, now)

    def admitted(self, work: Work, now: float) -> None:
        self._places.pop(work.id, None)
        self._told("admitted", work, now)

    def withdrawn(self, work: Work, now: float) -> None:
        self._told("withdrawn", work, now)

    def preempted(self, work: Work, now: float) -> None:
        self._told("preempted", work, now)

    def emptied(self, group: Hashable) -> None:
        self._told("emptied", group)

    def account(self, works: Iterable[Work], now: float) -> None:
        self._told("account", works, now)

    def ended(self, work: Work, now: float) -> None:
        self._places.pop(work.id, None)
        self._told("ended", work, now)

    # Who gives way, rests, is given up

    def victim(self, work: Work, running: Sequence[Work], now: float) -> Work | None:
        found: Work | None = self._asked("victim", work, running, now)
        keep("victim is one of those that run", found is None or found in running, repr(found))
        return found

    def rank(self, work: Work, now: float) -> Any:
        found = self._asked("rank", work, now)
        keep("rank compares with itself", _ordered(found), repr(found))
        return found

    def hopeless(self, work: Work, now: float) -> Verdict | None:
        found: Verdict | None = self._asked("hopeless", work, now)
        if found is not None:
            keep("hopeless returns a Verdict or None", isinstance(found, Verdict), repr(found))
            text = found.message.strip() if isinstance(found.message, str) else ""
            keep("who drops work says why", bool(text) or not found.drop, repr(found))
        return found

    def resting(self, running: Sequence[Work], now: float) -> Collection[Work]:
        found: Collection[Work] = self._asked("resting", running, now)
        keep("resting are some of those that run", set(found) <= set(running), repr(found))
        keep("never all of them rest", len(set(found)) < len(running), repr(found))
        return found

    def step_s(self, running: Sequence[Work], now: float) -> float | None:
        found: float | None = self._asked("step_s", running, now)
        keep("step_s is a time or None", found is None or 0 <= found < math.inf, repr(found))
        return found

    # How

    def _told(self, method: str, *given: Any) -> None:
        """Tell the policy of something that happened."""
        _call(getattr(self.within, method), given)

    def _asked(self, method: str, *given: Any) -> Any:
        """Ask the policy; the question must not change what it knows or what it is asked about."""
        self._questions += 1
        # A close look costs a thousand times what the answer does: the first hundred, then some.
        often = method in ("rank", "order", "group")
        if often or (self._questions > 100 and self._questions % 16):
            return _call(getattr(self.within, method), given)
        before = snapshot(self.within), snapshot(given)
        found = _call(getattr(self.within, method), given)
        if method == "first":
            keep("first changes no state", before[0] == snapshot(self.within), "it did")
        keep(f"{method} leaves work as it is", before[1] == snapshot(given), "it did not")
        return found


def _call(method: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    try:
        return method(*given)
    except BrokenPromise:
        raise
    except Exception as error:
        raise BrokenPromise(
            f"broken: {method.__name__} raises nothing. Found: {type(error).__name__}: {error}"
        ) from error


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _ordered(value: Any) -> bool:
    """Whether it is a sort key; NaN and None are not."""
    try:
        return not value < value and value == value
    except TypeError:
        return False


# What a policy knows


def snapshot(value: Any) -> Any:
    """Return a value as one that does not change with it, and can be compared."""
    return _frozen(value, set())


def _frozen(value: Any, above: set[int]) -> Any:
    if isinstance(value, str | bytes | int | float | bool | None):
        return value
    if id(value) in above:
        return "…"
    above = above | {id(value)}
    if isinstance(value, Mapping):
        return [(_frozen(key, above), _frozen(one, above)) for key, one in value.items()]
    if isinstance(value, Set):
        return sorted(repr(_frozen(one, above)) for one in value)
    if isinstance(value, Iterable) and not hasattr(value, "__next__"):
        return [_frozen(one, above) for one in value]
    if isinstance(value, type) or callable(value):
        return repr(value)
    return [(name, _frozen(one, above)) for name, one in _fields(value)]


def _fields(value: Any) -> list[tuple[str, Any]]:
    names = [*getattr(value, "__dict__", {})]
    for kind in type(value).__mro__:
        slots = getattr(kind, "__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]


def contents(value: Any) -> tuple[list[Work], set[str], int]:
    """All that a policy holds, however deep: work, texts, and how many values in all."""
    works: list[Work] = []
    texts: set[str] = set()
    seen: dict[int, Any] = {}
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            texts.add(one)
        if isinstance(one, str | bytes | int | float | bool | None):
            continue
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, Work):
            works.append(one)
        elif isinstance(one, Mapping):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, Iterable) and not hasattr(one, "__next__"):
            left += one
        elif not isinstance(one, type) and not callable(one):
            left += [field for _, field in _fields(one)]
    return works, texts, _size(seen)


def _size(seen: Mapping[int, Any]) -> int:
    return sum(len(one) if hasattr(one, "__len__") else 1 for one in seen.values())
