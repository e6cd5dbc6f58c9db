"""vLLM's queue of waiting requests, in the order of a policy between tenants.

Within a tenant first come, first served, as vLLM's own. With one tenant it is vLLM's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import RequestStatus

from .fair import VirtualTokens
from .terms import DEFAULT, TENANT, WEIGHT


def tenant_of(request: Any) -> str:
    """Return the name of a request's tenant."""
    params = request.sampling_params
    extra = params.extra_args if params is not None else None
    return str(extra.get(TENANT, DEFAULT)) if extra else DEFAULT


def weight_of(request: Any) -> float | None:
    """Return the weight that a request brings, if it brings one that makes sense."""
    params = request.sampling_params
    extra = params.extra_args if params is not None else None
    weight = extra.get(WEIGHT) if extra else None
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        return None
    return float(weight) if 0 < weight < float("inf") else None


class FairQueue(RequestQueue):  # type: ignore[misc]
    """A queue per tenant; the policy says whose is next."""

    def __init__(self, policy: VirtualTokens) -> None:
        self._policy = policy
        self._queues: dict[str, deque[Any]] = {}
        self._charged: set[str] = set()
        """Requests whose prompts were charged when they left, by id, until they end."""

    def add_request(self, request: Any) -> None:
        """Add a request at the end of its tenant's."""
        tenant = tenant_of(request)
        if (weight := weight_of(request)) is not None:
            self._policy.weigh(tenant, weight)
        self._policy.arrive(tenant, self._queues)
        self._queues.setdefault(tenant, deque()).append(request)

    def peek_request(self) -> Any:
        """Return the request whose turn it is.

        Raises:
            IndexError: there is none.
        """
        if not self._queues:
            raise IndexError("peek from an empty queue")
        return self._queues[self._policy.first(self._queues)][0]

    def pop_request(self) -> Any:
        """Take out the request whose turn it is, and charge its prompt to its tenant, once.

        Raises:
            IndexError: there is none.
        """
        if not self._queues:
            raise IndexError("pop from an empty queue")
        tenant = self._policy.first(self._queues)
        queue = self._queues[tenant]
        request = queue.popleft()
        if request.request_id not in self._charged:
            self._charged.add(request.request_id)
            self._policy.serve(tenant, prompt=request.num_prompt_tokens)
        if not queue:
            del self._queues[tenant]
            self._policy.empty(tenant)
        return request

    def prepend_request(self, request: Any) -> None:
        """Put a request back that was running: it is its tenant's next."""
        self._queues.setdefault(tenant_of(request), deque()).appendleft(request)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        """Put back what was taken out and could not be scheduled."""
        for request in requests:
            if request.status is not RequestStatus.PREEMPTED:
                self._charged.discard(request.request_id)
                self._policy.serve(tenant_of(request), prompt=-request.num_prompt_tokens)
            self.prepend_request(request)

    def remove_request(self, request: Any) -> None:
        """Take a request out.

        Raises:
            ValueError: it is not here.
        """
        tenant = tenant_of(request)
        queue = self._queues.get(tenant, deque())
        queue.remove(request)
        if not queue:
            del self._queues[tenant]
            self._policy.empty(tenant)

    def remove_requests(self, requests: Iterable[Any]) -> None:
        """Take out those of these that are here."""
        for request in requests:
            if request in self._queues.get(tenant_of(request), ()):
                self.remove_request(request)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests have ended."""
        self._charged.difference_update(request_ids)

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return bool(self._queues)

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Any]:
        """Requests, tenant by tenant."""
        return chain.from_iterable(list(self._queues.values()))
