"""vLLM's queue of waiting requests, in a policy's order.

Requests stand in the policy's groups, sorted; whose group is next is asked when vLLM looks, which
is only where it has a seat to give. What was taken out and put back (preempted, or not schedulable
now) stands again where it stood.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import chain, count
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.request_queue import RequestQueue

from .policy import Policy, Work

if TYPE_CHECKING:
    from .tenancy import Tenancy

_Entry = tuple[Any, int, Any]
"""Sort key, number of arrival, request: the number decides before requests are compared."""


class PolicyQueue(RequestQueue):  # type: ignore[misc]
    """See the module.

    Args:
        policy: whose order it is.
        work_of: what the policy knows of a request.
        account: tell the policy what running work has made; asked before it chooses.
        tenancy: limits of tenants, whatever their turn; None: there are none.
    """

    def __init__(
        self,
        policy: Policy,
        work_of: Callable[[Any], Work],
        account: Callable[[float], None],
        tenancy: Tenancy | None = None,
    ) -> None:
        self.now = 0.0
        """The step's time: peek and pop agree only where it is the same for both."""
        self._policy = policy
        self._work_of = work_of
        self._account = account
        self._tenancy = tenancy
        self._numbers = count()
        self._number_of: dict[str, int] = {}
        self._groups: dict[tuple[Hashable, Hashable], list[_Entry]] = {}
        """(The policy's group, tenant) → its entries. The tenant where not all may begin."""
        self._next: tuple[Hashable, Hashable] | None = None
        """Whose turn it is, until something changes."""
        self._accounted = False

    def begin(self, now: float) -> None:
        """A step begins."""
        self.now = now
        self._next = None
        self._accounted = False

    # Turns

    def _turn(self) -> tuple[Hashable, Hashable] | None:
        """The group whose turn it is; None where nobody waits who may begin."""
        if self._next is None and self._groups:
            self._next = self._choose({key: entries[0] for key, entries in self._groups.items()})
        return self._next

    def _choose(
        self, heads: dict[tuple[Hashable, Hashable], _Entry]
    ) -> tuple[Hashable, Hashable] | None:
        if self._tenancy is not None:
            allows, work_of = self._tenancy.allows, self._work_of
            heads = {key: e for key, e in heads.items() if allows(work_of(e[2]), self.now)}
        if len(heads) < 2:
            return next(iter(heads), None)
        if not self._accounted:
            self._accounted = True
            self._account(self.now)
        first: dict[Hashable, tuple[Hashable, Hashable]] = {}
        for key, entry in heads.items():
            known = first.get(key[0])
            if known is None or entry[:2] < heads[known][:2]:
                first[key[0]] = key
        works = {group: self._work_of(heads[key][2]) for group, key in first.items()}
        return first[self._policy.first(works, self.now)]

    def heads(self) -> list[Any]:
        """Return the requests that are first in their groups."""
        return [entries[0][2] for entries in self._groups.values()]

    def ahead(self, most: int) -> Iterator[Any]:
        """Requests in the order of their turns as it is now, `most` of them. Takes none out."""
        places = dict.fromkeys(self._groups, 0)
        for _ in range(most):
            heads = {
                key: self._groups[key][place]
                for key, place in places.items()
                if place < len(self._groups[key])
            }
            key = self._choose(heads)
            if key is None:
                return
            yield heads[key][2]
            places[key] += 1

    # vLLM's interface

    def add_request(self, request: Any) -> None:
        """Add a request that comes to wait."""
        if request.request_id not in self._number_of:
            waiting = {group for group, _ in self._groups}
            self._policy.arrived(self._work_of(request), waiting, self.now)
        self._insert(request)

    def _insert(self, request: Any) -> None:
        id_ = request.request_id
        number = self._number_of.get(id_)
        if number is None:
            number = self._number_of[id_] = next(self._numbers)
        work = self._work_of(request)
        key = self._key(work)
        entry = (self._policy.order(work), number, request)
        bisect.insort(self._groups.setdefault(key, []), entry)
        self._next = None

    def _key(self, work: Work) -> tuple[Hashable, Hashable]:
        return self._policy.group(work), work.tenant if self._tenancy is not None else None

    def peek_request(self) -> Any:
        """Return the request whose turn it is.

        Raises:
            IndexError: there is none.
        """
        turn = self._turn()
        if turn is None:
            raise IndexError("peek from an empty queue")
        return self._groups[turn][0][2]

    def pop_request(self) -> Any:
        """Take out the request whose turn it is.

        Raises:
            IndexError: there is none.
        """
        turn = self._turn()
        if turn is None:
            raise IndexError("pop from an empty queue")
        request = self._groups[turn].pop(0)[2]
        self._left(turn)
        work = self._work_of(request)
        work.since = self.now
        self._policy.admitted(work, self.now)
        if self._tenancy is not None:
            self._tenancy.started(work, self.now)
        return request

    def _left(self, key: tuple[Hashable, Hashable]) -> None:
        self._next = None
        if not self._groups[key]:
            del self._groups[key]
            if all(group != key[0] for group, _ in self._groups):
                self._policy.emptied(key[0])

    def prepend_request(self, request: Any) -> None:
        """Put a request back that was preempted."""
        work = self._work_of(request)
        work.preemptions += 1
        self._policy.preempted(work, self.now)
        self._returned(work, request)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        """Put back what was taken out and could not be scheduled."""
        for request in requests:
            work = self._work_of(request)
            self._policy.withdrawn(work, self.now)
            self._returned(work, request)

    def _returned(self, work: Work, request: Any) -> None:
        work.since = None
        if self._tenancy is not None:
            self._tenancy.stopped(work, self.now)
        self._insert(request)

    def remove_request(self, request: Any) -> None:
        """Take a request out.

        Raises:
            ValueError: it is not here.
        """
        key = self._key(self._work_of(request))
        entries = self._groups.get(key, [])
        for place, entry in enumerate(entries):
            if entry[2] is request:
                del entries[place]
                self._left(key)
                return
        raise ValueError(f"{request.request_id} does not wait")

    def remove_requests(self, requests: Iterable[Any]) -> None:
        """Take out those of these that are here."""
        gone: dict[tuple[Hashable, Hashable], set[int]] = {}
        for request in requests:
            gone.setdefault(self._key(self._work_of(request)), set()).add(id(request))
        for key, ids in gone.items():
            entries = self._groups.get(key, [])
            kept = [entry for entry in entries if id(entry[2]) not in ids]
            if len(kept) < len(entries):
                self._groups[key] = kept
                self._left(key)

    def demote(self, request: Any) -> None:
        """Put a request where its work belongs now that it is hopeless."""
        self.remove_request(request)
        self._work_of(request).demoted = True
        self._insert(request)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._number_of.pop(request_id, None)

    def __bool__(self) -> bool:
        """Whether any waits that may begin."""
        return self._turn() is not None

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._groups.values()))

    def __iter__(self) -> Iterator[Any]:
        """Requests, group by group."""
        return iter([entry[2] for entry in chain.from_iterable(self._groups.values())])
