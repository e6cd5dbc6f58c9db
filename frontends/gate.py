"""The gate: every request that brings work for the engine shows its key, or waits outside.

It stands where the headers are known and the body is not: in front of both lanes. A request without
a right key is not its business (vLLM's own middleware answers it); one that a limit has no room for
is answered here, at once. The others get a `Pass`, which is given back when they are answered.
There is a gate only where a limit or a tenants file was configured.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import prometheus_client

from scalellm_plugins import config
from scalellm_plugins.errors import ConfigError

from . import authentication, counting, refusals, sessions
from .accounting import Accounting
from .admission import SERVER, Admission, Bounds, Prompt, Ticket
from .bound import Bound
from .headers import CrossOrigin
from .limits import GAUGES, UNLIMITED, DrainRate, Limits, Refusal
from .metric import metric
from .refusals import is_anthropic, path_of
from .tenants import OPTION, Tenant, TenantFile

logger = logging.getLogger("vllm.scalellm")

GUARDED = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/cohere/v2/chat",
        "/inference/v1/generate",
        "/generative_scoring",
        "/v1/systemone",
        "/v1/decisions",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/embeddings",
        "/v2/embed",
        "/pooling",
        "/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
        "/invocations",
    }
)
"""Paths whose POST brings the engine a prompt, in any supported release of vLLM."""

_TICK_S = 1.0


class Seat(NamedTuple):
    """A tenant as it is counted: its number and its limits; and what binds its requests."""

    tenant: Tenant
    entry: int
    bounds: Bounds
    bound: Bound | None = None


class Pass(Ticket):
    """An admitted request at the gate."""

    __slots__ = ("_bounds", "_cycle", "_gate", "bound", "in_application", "refusal")

    def __init__(self, gate: Gate, seat: Seat, cycle: Any) -> None:
        super().__init__(gate.counters, seat.tenant.name, seat.entry)
        self.bound = seat.bound
        """What the tenants file says about it; None where there is none."""
        self._gate = gate
        self._bounds = seat.bounds
        self._cycle = cycle
        self.in_application = False
        """Whether vLLM's application has it: then it is given back when that has done."""
        self.refusal: Refusal | None = None

    def count(self, tokens: int, *, running: bool = False) -> Prompt | Refusal:
        """Count a prompt, now that it is known; a refusal is remembered."""
        made = self.prompt(tokens, self._bounds, self._gate.bounds, running=running)
        if isinstance(made, Refusal):
            self.refusal = made
            self._gate.count_refusal(self.tenant, made)
        return made

    def admit_prompt(self, connection: Any, tokens: int) -> bool:
        """Count a prompt of the fast lane; False: there is no room, and the client was told so."""
        refusal = self.count(tokens)
        if isinstance(refusal, Refusal):
            self._gate.refuse(connection, self._cycle, refusal)
            return False
        return True

    def retry_after(self, refusal: Refusal) -> int:
        """See `Gate.retry_after`."""
        return self._gate.retry_after(self._entry, refusal)

    def carried(self, app: Any) -> Any:
        """Return the application with this pass in its context, until it has done."""
        self.in_application = True

        async def with_pass(scope: Any, receive: Any, send: Any) -> None:
            counting.current.set(self)
            try:
                await app(scope, receive, self._sender(send))
            finally:
                self.leave()

        return with_pass

    def _sender(self, send: Any) -> Any:
        """Put the gate's answer in place of the application's, if a prompt was refused in it."""
        ours = False

        async def send_ours(message: Any) -> None:
            nonlocal ours
            if ours:
                return
            if self.refusal is None or message["type"] != "http.response.start":
                await send(message)
                return
            ours = True
            seconds = self.retry_after(self.refusal)
            body = self.refusal.body(seconds, anthropic=is_anthropic(self._cycle.scope))
            kept = {b"content-type", b"content-length", b"transfer-encoding", b"retry-after"}
            headers = [pair for pair in message["headers"] if pair[0].lower() not in kept]
            headers += [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"retry-after", b"%d" % seconds),
            ]
            await send({**message, "status": self.refusal.status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        return send_ours


class Gate:
    """One per worker; see the module."""

    def __init__(
        self,
        counters: Admission,
        tenants: TenantFile,
        limits: Limits,
        accounting: Accounting,
        cross_origin: CrossOrigin,
        *,
        echo_id: bool = False,
    ) -> None:
        self.counters = counters
        self.tenants = tenants
        self.bounds = limits.by_gauge()
        self._accounting = accounting
        self._cross_origin = cross_origin
        self._echo_id = echo_id
        self._seats: dict[str, Seat] = {}
        self._drains: dict[int, DrainRate] = {}
        self._refused = metric(
            prometheus_client.Counter,
            "scalellm:admission_rejections",
            "Requests that a limit had no room for, by the limit's owner and name",
            ("tenant", "limit"),
        )
        self._gauges = [
            metric(
                prometheus_client.Gauge,
                f"scalellm:admission_{gauge}",
                f"What the limit max_{gauge} is about, by tenant, over all workers",
                ("tenant",),
                multiprocess_mode="mostrecent",
            )
            for gauge in GAUGES
        ]
        self._watching: asyncio.Task[None] | None = None
        self.tick()

    # Requests

    def admit(self, connection: Any, cycle: Any) -> bool:
        """Let a request in whose headers are known; False: it was refused, and answered.

        Its pass is `cycle.scalellm_pass`, None where none is needed.
        """
        cycle.scalellm_pass = connection.admitted = None
        scope = cycle.scope
        if scope["method"] != "POST" or path_of(scope) not in GUARDED:
            return True
        tenant = self.tenants.book.of(authentication.shown(scope))
        if tenant is None:
            if path_of(scope) != "/invocations":
                return True  # vLLM's middleware refuses it
            tenant = self.tenants.book.default  # vLLM asks for no key here
        ticket = self.enter(tenant, cycle)
        if isinstance(ticket, Refusal):
            self.refuse(connection, cycle, ticket, self._seats[tenant.name].entry)
            return False
        cycle.scalellm_pass = connection.admitted = ticket
        cycle.on_response = _then(ticket.leave, cycle.on_response)
        return True

    def enter(self, tenant: Tenant, cycle: Any) -> Pass | Refusal:
        """Count a request of a tenant; or count that there is no room for it, and say why."""
        seat = self._seats.get(tenant.name) or self._seat(tenant)
        refusal = self.counters.enter(tenant.name, seat.entry, seat.bounds, self.bounds)
        if refusal is None:
            return Pass(self, seat, cycle)
        self.count_refusal(tenant.name, refusal)
        return refusal

    def _seat(self, tenant: Tenant) -> Seat:
        bound = Bound(tenant) if self.tenants.is_file else None
        seat = Seat(tenant, self.counters.index(tenant.name), tenant.by_gauge(), bound)
        self._seats[tenant.name] = seat
        return seat

    def stranger(self) -> Bound | None:
        """Return what binds a request that no pass is for: a file's entry for everybody else."""
        default = self.tenants.book.default
        return (self._seats.get(default.name) or self._seat(default)).bound

    def retry_after(self, entry: int, refusal: Refusal) -> int:
        """Return in how many seconds there is room, going by what has left lately."""
        drain = self._drains.get(SERVER if refusal.tenant is None else entry)
        return refusal.retry_after(None if drain is None else drain.rate(refusal.gauge))

    def count_refusal(self, tenant: str, refusal: Refusal) -> None:
        """Count it: `tenant` is who was refused, the label says whose limit it was."""
        owner = "server" if refusal.tenant is None else "tenant"
        self._refused.labels(tenant, f"{owner}.{refusal.option}").inc()

    def refuse(self, connection: Any, cycle: Any, refusal: Refusal, entry: int = SERVER) -> None:
        """Answer a request whose body may not have been read."""
        if cycle.disconnected:
            return
        ticket = cycle.scalellm_pass
        seconds = (
            self.retry_after(entry, refusal) if ticket is None else ticket.retry_after(refusal)
        )
        body = refusal.body(seconds, anthropic=is_anthropic(cycle.scope))
        headers = dict(reversed(cycle.scope["headers"]))  # the first of each name
        lines = b"retry-after: %d\r\n" % seconds + self._cross_origin.lines(headers.get(b"origin"))
        if self._echo_id:
            request_id = headers.get(b"x-request-id") or uuid.uuid4().hex.encode()
            lines += b"x-request-id: %b\r\n" % request_id
        self._accounting.started(cycle, refusal.status)
        refusals.respond(connection, cycle, refusal.status, lines, body)
        length = int(headers.get(b"content-length", 0))
        ask = SimpleNamespace(route=SimpleNamespace(path=path_of(cycle.scope)), length=length)
        answer: Any = SimpleNamespace(cycle=cycle, length=len(body), ask=ask)
        self._accounting.ended(answer, refusal.status, 0.0)
        if cycle.access_log and self._accounting.own_log:
            self._accounting.log(cycle.scope, refusal.status, 0.0)

    # Every second

    def watch(self) -> None:
        """Look after files and rates from now on, in the running event loop."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self.tenants.poll()
                self.tick()
            except Exception:
                logger.exception("admission: the tenants could not be looked after")

    def tick(self) -> None:
        """Take over a changed tenants file, measure how fast things drain, publish gauges."""
        book = self.tenants.book
        for tenant in book.by_name.values():
            seat = self._seats.get(tenant.name)
            if seat is None or seat.tenant is not tenant:
                self._seat(tenant)
        now = time.monotonic()
        self._sample(SERVER, now, self.counters.used(SERVER))
        for name, seat in self._seats.items():
            used = self.counters.used(seat.entry)
            if seat.bounds != UNLIMITED.by_gauge():
                self._sample(seat.entry, now, used)
            for gauge, value in zip(self._gauges, used, strict=True):
                gauge.labels(name).set(value)

    def _sample(self, entry: int, now: float, used: list[int]) -> None:
        left = self.counters.left(entry)
        drain = self._drains.get(entry)
        if drain is None:
            self._drains[entry] = DrainRate(now, left)
        else:
            drain.sample(now, left, used)


def _then(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


# Putting it up


def attach(engine_client: Any, app: Any, state: Any, args: Namespace) -> Gate | None:
    """Put a gate in front of this server, if a limit or a tenants file was configured.

    Called before the fast lane is built, so that what the lane leaves to vLLM is counted.

    Raises:
        ConfigError: the tenants file cannot be used. The server must not start without it.
    """
    options = config.current().frontend
    limits = Limits(**{name: getattr(options, name) for name in Limits.__struct_fields__})
    if options.tenants is None and limits == UNLIMITED:
        return None
    import vllm.envs as envs

    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    counters = _counters()
    tenants = TenantFile(options.tenants, keys, counters)
    gate = Gate(
        counters,
        tenants,
        limits,
        Accounting(app, options.access_log),
        CrossOrigin(app),
        echo_id=bool(args.enable_request_id_headers),
    )
    if options.tenants is not None:
        authentication.install(app, keys, tenants)
    counting.install(engine_client)
    sessions.install(app, gate)
    gate.watch()
    state.scalellm_gate = gate
    logger.info("admission: %s", _described(limits, tenants))
    return gate


def check_off() -> None:
    """Refuse to serve without the gate, although tenants are to show their keys at it.

    Raises:
        ConfigError: there is a tenants file, and the frontend is off for another reason than that
            somebody said so.
    """
    options = config.current().frontend
    if options.tenants is not None and options.enabled is not False:
        raise ConfigError(
            f"{OPTION}: {options.tenants!r} would not be looked at, because scalellm.frontend is "
            "off here (the table in the log says why), and everybody would be let in. Remove the "
            "option, or say --scalellm.frontend off and guard the server with --api-key"
        )


def _counters() -> Admission:
    from .worker import current

    worker = current()
    if worker is None:
        return Admission.private()
    counters: Admission = worker.slots.counters
    return counters.for_slot(worker.index)


def _described(limits: Limits, tenants: TenantFile) -> str:
    given = [f"{gauge} <= {n}" for gauge, n in zip(GAUGES, limits.by_gauge(), strict=True) if n]
    given.append(f"{len(tenants.book.by_name)} tenants")
    return ", ".join(given)
