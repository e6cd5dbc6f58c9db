"""What is in flight, exactly, over all worker processes of a server.

For the server and for each tenant there are four gauges (see limits.py) and four counts of what has
left them, as shared counters: number `entry * 8 + field`, entry 0 is the server. Whoever adds does
so under their lock; what leaves needs none (see shared_counters.py). A mapping holds a digest of
each entry's name, so that workers that read a tenants file at different moments agree on the
numbers. Pure: imports neither vLLM nor torch.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from scalellm_plugins.errors import ConfigError

from .limits import (
    GAUGES,
    PROMPT_TOKENS,
    QUEUED_PROMPT_TOKENS,
    QUEUED_REQUESTS,
    REQUESTS,
    Refusal,
)
from .shared_counters import SharedCounters, SharedLock

SERVER = 0
MOST_TENANTS = 4096
"""Names over a server's life. Memory is only used for those that are there."""

_FIELDS = 2 * len(GAUGES)
_LEFT = len(GAUGES)
_DIGEST = 16
_NONE = (None,) * len(GAUGES)

Bounds = Sequence[int | None]
"""One limit per gauge, as `Limits.by_gauge` has them."""


class Admission:
    """The shared counters, as seen from one worker slot; see the module."""

    def __init__(
        self,
        counters: SharedCounters,
        names: mmap.mmap,
        lock: AbstractContextManager[None],
        note: int,
    ) -> None:
        self._counters = counters
        self._names = names
        self._lock = lock
        self._note = note
        self._slot = 0
        self._known: dict[str, int] = {}

    @classmethod
    def create(cls, slots: int) -> Admission:
        """Make the memory for `slots` workers, before any of them is forked."""
        return cls._make(slots, SharedLock("scalellm_admission"))

    @classmethod
    def private(cls) -> Admission:
        """Counters of a server that is one process: no lock."""
        return cls._make(1, nullcontext())

    @classmethod
    def _make(cls, slots: int, lock: AbstractContextManager[None]) -> Admission:
        entries = MOST_TENANTS + 1
        counters = SharedCounters(entries * _FIELDS, slots)
        note = os.memfd_create("scalellm_tenants", os.MFD_CLOEXEC)
        return cls(counters, mmap.mmap(-1, entries * _DIGEST), lock, note)

    def for_slot(self, slot: int) -> Admission:
        """Return the same counters for the worker in `slot`, after the fork."""
        assert 0 <= slot < self._counters.slots, (slot, self._counters.slots)
        made = Admission(self._counters, self._names, self._lock, self._note)
        made._slot = slot
        return made

    # What a new worker is to know from those before it

    def remember(self, note: bytes) -> None:
        """Keep a note for all workers, in place of the last one."""
        with self._lock:
            os.ftruncate(self._note, 0)
            os.pwrite(self._note, note, 0)

    def recall(self) -> bytes:
        """Return the note; empty if there is none."""
        with self._lock:
            return os.pread(self._note, os.fstat(self._note).st_size, 0)

    # Names

    def index(self, tenant: str) -> int:
        """Return the number under which all workers count this tenant; never 0.

        Raises:
            ConfigError: there have been too many names since the server was started.
        """
        known = self._known.get(tenant)
        if known is None:
            digest = hashlib.blake2b(tenant.encode(), digest_size=_DIGEST).digest()
            with self._lock:
                known = self._known[tenant] = self._find(tenant, digest)
        return known

    def _find(self, tenant: str, digest: bytes) -> int:
        free = bytes(_DIGEST)
        for entry in range(1, MOST_TENANTS + 1):
            at = entry * _DIGEST
            there = self._names[at : at + _DIGEST]
            if there == free:
                self._names[at : at + _DIGEST] = digest
                return entry
            if there == digest:
                return entry
        raise ConfigError(
            f"tenant {tenant!r}: this server has seen {MOST_TENANTS} tenants' names since it was "
            "started, the most it can count. Restart it to forget those that are gone"
        )

    # Looking

    def used(self, entry: int) -> list[int]:
        """Return what the server (0) or a tenant has at the moment, in the order of `GAUGES`."""
        return [self._counters.sum(entry * _FIELDS + gauge) for gauge in range(len(GAUGES))]

    def left(self, entry: int) -> list[int]:
        """Return what has left each gauge since the server was started; only ever grows."""
        first = entry * _FIELDS + _LEFT
        return [self._counters.sum(first + gauge) for gauge in range(len(GAUGES))]

    # Changing

    def _add(self, entry: int, gauge: int, amount: int) -> None:
        self._counters.add(entry * _FIELDS + gauge, self._slot, amount)

    def _take(self, entry: int, gauge: int, amount: int) -> None:
        counter = entry * _FIELDS + gauge
        self._counters.add(counter, self._slot, -amount)
        self._counters.add(counter + _LEFT, self._slot, amount)

    def enter(
        self, tenant: str, entry: int, bounds: Bounds = _NONE, server_bounds: Bounds = _NONE
    ) -> Refusal | None:
        """Count one more request, queued, whose prompt is not known yet; or say why not.

        It is refused when a limit on requests has no room for it, or when prompt tokens have
        reached theirs. `entry` is the tenant's number, `server_bounds` are those of all tenants.
        """
        with self._lock:
            refusal = self._full(tenant, entry, bounds) or self._full(None, SERVER, server_bounds)
            if refusal is None:
                for each in (entry, SERVER):
                    self._add(each, REQUESTS, 1)
                    self._add(each, QUEUED_REQUESTS, 1)
        return refusal

    def _full(self, tenant: str | None, entry: int, bounds: Bounds) -> Refusal | None:
        for gauge, limit in enumerate(bounds):
            if limit is not None:
                used = self._counters.sum(entry * _FIELDS + gauge)
                if used >= limit:
                    return Refusal(tenant, gauge, limit, used, 1)
        return None

    def prompt(
        self,
        tenant: str,
        entry: int,
        tokens: int,
        bounds: Bounds = _NONE,
        server_bounds: Bounds = _NONE,
    ) -> Refusal | None:
        """Count a prompt of `tokens`, queued, now that it is known; or say why not.

        A prompt that is larger than what is left of a limit is refused, unless there is no other:
        else one that is larger than the limit could never be served.
        """
        with self._lock:
            refusal = self._too_long(tenant, entry, tokens, bounds)
            refusal = refusal or self._too_long(None, SERVER, tokens, server_bounds)
            if refusal is None:
                self.add_tokens(entry, tokens)
        return refusal

    def _too_long(
        self, tenant: str | None, entry: int, tokens: int, bounds: Bounds
    ) -> Refusal | None:
        for gauge in (PROMPT_TOKENS, QUEUED_PROMPT_TOKENS):
            limit = bounds[gauge]
            if limit is not None:
                used = self._counters.sum(entry * _FIELDS + gauge)
                if used and used + tokens > limit:
                    return Refusal(tenant, gauge, limit, used, tokens)
        return None

    def add_tokens(self, entry: int, tokens: int) -> None:
        """Count more prompt tokens of an admitted request, whatever the limits."""
        for each in (entry, SERVER):
            self._add(each, PROMPT_TOKENS, tokens)
            self._add(each, QUEUED_PROMPT_TOKENS, tokens)

    def dequeue(self, entry: int, requests: int, tokens: int) -> None:
        """Requests with so many prompt tokens are no longer queued: they have a first token."""
        for each in (entry, SERVER):
            if requests:
                self._take(each, QUEUED_REQUESTS, requests)
            if tokens:
                self._take(each, QUEUED_PROMPT_TOKENS, tokens)

    def leave(self, entry: int, requests: int, tokens: int) -> None:
        """Requests with so many prompt tokens are no longer in flight (nor queued: see above)."""
        for each in (entry, SERVER):
            if requests:
                self._take(each, REQUESTS, requests)
            if tokens:
                self._take(each, PROMPT_TOKENS, tokens)

    def forget(self, slot: int) -> None:
        """Clear what a worker that is gone had in flight. Called by its supervisor, before the
        slot has another worker, so the words have no other writer."""
        names = sum(1 for _ in self._entries())
        for entry in range(names + 1):
            for gauge in range(len(GAUGES)):
                self._counters.put(entry * _FIELDS + gauge, slot, 0)

    def _entries(self) -> Iterator[int]:
        free = bytes(_DIGEST)
        for entry in range(1, MOST_TENANTS + 1):
            if self._names[entry * _DIGEST : (entry + 1) * _DIGEST] == free:
                return
            yield entry


class Ticket:
    """One admitted request, from its headers to its end. Every method may be called too often."""

    __slots__ = (
        "_admission",
        "_checked",
        "_closing",
        "_entry",
        "_open",
        "_prompts",
        "_queued",
        "tenant",
    )

    def __init__(self, admission: Admission, tenant: str, entry: int) -> None:
        self._admission = admission
        self._entry = entry
        self._prompts: set[Prompt] = set()
        self._queued = True
        self._checked = False
        self._closing = False
        self._open = True
        self.tenant = tenant

    def prompt(
        self,
        tokens: int,
        bounds: Bounds = _NONE,
        server_bounds: Bounds = _NONE,
        *,
        running: bool = False,
    ) -> Prompt | Refusal:
        """Count a prompt of the request. Only its first can be refused: the rest belongs to it.

        A prompt that is `running` ends by its own `done`; another one with the request.
        """
        admission, entry = self._admission, self._entry
        if not self._open:
            if not running:
                return Prompt(self, 0, running)  # its client went away meanwhile
            # The HTTP exchange is over and the engine gets work all the same: in the background.
            admission.enter(self.tenant, entry)
            self._open = self._queued = True
        if not self._checked:
            refusal = admission.prompt(self.tenant, entry, tokens, bounds, server_bounds)
            if refusal is not None:
                self._close()
                return refusal
            self._checked = True
        else:
            admission.add_tokens(entry, tokens)
        made = Prompt(self, tokens, running)
        self._prompts.add(made)
        return made

    def first(self) -> None:
        """The request's first token has come, and with it that of prompts that are not running."""
        if self._queued and self._open:
            self._queued = False
            self._admission.dequeue(self._entry, 1, 0)
            for prompt in self._prompts:
                if not prompt.running:
                    prompt.first()

    def leave(self) -> None:
        """The request is answered, or nobody waits for it.

        What the engine still works on for it (a response in the background) stays counted, and the
        request with it.
        """
        self._closing = True
        for prompt in [prompt for prompt in self._prompts if not prompt.running]:
            prompt.done()
        self._close()

    def _close(self) -> None:
        if self._closing and self._open and not self._prompts:
            self.first()
            self._open = False
            self._admission.leave(self._entry, 1, 0)


class Prompt:
    """One prompt of a request, made by `Ticket.prompt`."""

    __slots__ = ("_queued", "_ticket", "_tokens", "running")

    def __init__(self, ticket: Ticket, tokens: int, running: bool) -> None:
        self._ticket = ticket
        self._tokens = tokens
        self._queued = True
        self.running = running

    def grow(self, tokens: int) -> None:
        """The prompt turned out to have so many more tokens."""
        ticket = self._ticket
        if self in ticket._prompts and self._queued:
            self._tokens += tokens
            ticket._admission.add_tokens(ticket._entry, tokens)

    def first(self) -> None:
        """Its first token has come; so the request has one."""
        ticket = self._ticket
        if self._queued and self in ticket._prompts:
            self._queued = False
            ticket._admission.dequeue(ticket._entry, 0, self._tokens)
            ticket.first()

    def done(self) -> None:
        """The engine has done with it."""
        ticket = self._ticket
        if self in ticket._prompts:
            if self._queued:
                self._queued = False
                ticket._admission.dequeue(ticket._entry, 0, self._tokens)
            ticket._prompts.discard(self)
            ticket._admission.leave(ticket._entry, 0, self._tokens)
            ticket._close()
