"""The supervisor: forks workers, replaces those that die, and follows demand.

It imports everything once and forks workers from itself, so that a new one serves after a fraction
of a second instead of the ten that the imports take, and all share the imported pages. For the
forks to be safe it has one thread and stays away from whatever starts more: it has no event loop,
no ZMQ socket and no engine client. It holds the listening sockets of every slot, HTTP's and ZMQ's,
so that a slot's next worker finds the engine already knocking.

Signals: SIGTERM and SIGINT end all workers; SIGTTIN starts one more and SIGTTOU retires one, within
the bounds, as an operator knows them from gunicorn.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from . import shared_values
from .scaling import CrashLoop, ScalingPolicy
from .slots import SlotTable
from .supervision import (
    AbortClient,
    Channel,
    EngineDead,
    EngineReady,
    Leaving,
    Message,
    Retire,
    Serving,
)
from .supervisor_warmth import check_threads, import_modules, warm_up
from .worker import Job, Worker, run

logger = logging.getLogger("vllm.scalellm")

_TICK_S = 0.25
_ORPHAN_GRACE_S = 10.0
"""How long workers have to leave once the main process is gone, which would else enforce it."""

_DRAIN_EVERY_S = 600.0
"""How often connections are dropped that wait at the sockets of empty slots: an engine gives a
handshake up after 30 s and tries anew, and the given-up stay queued until somebody accepts."""


@dataclass(frozen=True)
class Assignment:
    """What the main process hands to the supervisor: the work, and each slot's ZMQ listeners."""

    job: Job
    inputs: list[tuple[str, socket.socket]]
    outputs: list[tuple[str, socket.socket]]
    minimum: int
    admission: bool
    """Whether vLLM counts queued requests across workers (`--max-num-queued-reqs`)."""


State = Literal["empty", "starting", "serving", "retiring", "leaving"]


@dataclass
class Slot:
    """A place for one worker, at a time."""

    index: int
    listeners: dict[str, socket.socket]
    state: State = "empty"
    process: Any = None
    channel: Channel | None = None
    serving_since: float = 0.0
    start_at: float | None = None
    """When the next worker is due, if one is."""

    crashes: CrashLoop = field(default_factory=CrashLoop)


class Supervisor:
    """See the module. `run` returns the process's exit status."""

    def __init__(self, assignment: Assignment) -> None:
        self._job = assignment.job
        listeners = zip(assignment.inputs, assignment.outputs, strict=True)
        self._slots = [Slot(index, dict(pair)) for index, pair in enumerate(listeners)]
        self._table = SlotTable(len(self._slots))
        self._job.client_config["api_server_loads"] = self._table.loads
        if assignment.admission:
            self._job.client_config["mp_admission_counters"] = self._table.admission
        self._policy = ScalingPolicy(assignment.minimum, len(self._slots))
        self._selector = selectors.DefaultSelector()
        self._ready: dict[bytes, bytes] = {}
        self._stopping = False
        self._listening = True
        self._engine_dead = False
        self._kill_at: float | None = None
        self._status = 0
        self._drain_at = time.monotonic() + _DRAIN_EVERY_S
        self._wake, self._woken = os.pipe()

    def run(self) -> int:
        """Serve until told to stop, until the engine is gone, or until it makes no sense."""
        try:
            self._install_signals()
            shared_values.install()  # before anything makes a metric
            warm_up(self._job)
            return self._supervise()
        except Exception:
            logger.exception("the supervisor failed: ending the API servers")
            # Left alive, they would keep this process in multiprocessing's exit function.
            self._signal(signal.SIGKILL)
            return 1

    def _supervise(self) -> int:
        now = time.monotonic()
        for slot in self._slots[: self._policy.minimum]:
            slot.start_at = now
        while True:
            self._start_due()
            if not any(slot.process or slot.start_at for slot in self._slots):
                return self._status
            for key, _ in self._selector.select(_TICK_S):
                key.data()
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                self._signal(signal.SIGKILL)
            elif not self._stopping:
                self._scale()
            elif self._listening and not self._accepting():
                self._stop_listening()

    # Being told to stop

    def _install_signals(self) -> None:
        os.set_blocking(self._wake, False)
        os.set_blocking(self._woken, False)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTTIN, signal.SIGTTOU):
            signal.signal(number, lambda *_: None)
        self._selector.register(self._wake, selectors.EVENT_READ, self._on_signal)
        parent = multiprocessing.parent_process()
        assert parent is not None
        self._selector.register(parent.sentinel, selectors.EVENT_READ, self._on_orphaned)

    def _on_signal(self) -> None:
        with suppress(BlockingIOError):
            for number in os.read(self._wake, 64):
                if number == signal.SIGTTIN:
                    self._grow("asked for by signal")
                elif number == signal.SIGTTOU:
                    self._shrink("asked for by signal")
                else:
                    self._stop()

    def _on_orphaned(self) -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        self._selector.unregister(parent.sentinel)
        logger.warning("the main process is gone: ending the API servers")
        self._kill_at = time.monotonic() + _ORPHAN_GRACE_S
        self._stop()

    def _stop(self, status: int | None = None) -> None:
        self._stopping = True
        self._status = self._status if status is None else status
        for slot in self._slots:
            slot.start_at = None
        self._signal(signal.SIGTERM)

    def _accepting(self) -> bool:
        return any(slot.state in ("starting", "serving") for slot in self._slots)

    def _stop_listening(self) -> None:
        """Refuse connections from now on. The socket is the main process's and the workers', too:
        merely closed, it would let clients wait in its queue for nobody.

        Only when no worker accepts any more: it would take this for an error.
        """
        self._listening = False
        with suppress(OSError):
            self._job.sock.shutdown(socket.SHUT_RDWR)

    def _signal(self, number: int) -> None:
        for slot in self._slots:
            if slot.process is not None:
                with suppress(ProcessLookupError):
                    os.kill(slot.process.pid, number)

    # Starting workers

    def _start_due(self) -> None:
        for slot in self._slots:
            if slot.start_at is not None and slot.start_at <= time.monotonic():
                self._start(slot)

    def _start(self, slot: Slot) -> None:
        check_threads()
        ours, theirs = Channel.pair()
        worker = Worker(
            index=slot.index,
            slots=self._table,
            channel=theirs,
            listeners={address: sock.fileno() for address, sock in slot.listeners.items()},
            ready=dict(self._ready),
            job=self._job,
        )
        process = multiprocessing.get_context("fork").Process(
            target=self._become, args=(slot, ours, worker), name=f"ApiServer_{slot.index}"
        )
        # Else a signal between fork and the worker's own handlers would be lost in ours.
        blocked = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        theirs.close()
        slot.process, slot.channel, slot.state, slot.start_at = process, ours, "starting", None
        slot.serving_since = 0.0
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._on_message(slot, ours))
        self._selector.register(process.sentinel, selectors.EVENT_READ, lambda: self._on_end(slot))

    def _become(self, mine: Slot, ours: Channel, worker: Worker) -> None:
        """In the child: close what belongs to the supervisor and to other slots, and work."""
        self._selector.close()
        ours.close()
        os.close(self._wake)
        os.close(self._woken)
        for slot in self._slots:
            if slot is not mine:
                for sock in slot.listeners.values():
                    sock.close()
                if slot.channel is not None:
                    slot.channel.close()
        run(worker)

    # Hearing from workers

    def _on_message(self, slot: Slot, channel: Channel) -> None:
        if slot.channel is not channel:
            return  # its worker's end came first in the same round, and read it all
        for message in channel.receive():
            self._handle(slot, message)
        if channel.closed:
            self._selector.unregister(channel)

    def _handle(self, slot: Slot, message: Message) -> None:
        if isinstance(message, EngineReady):
            self._ready = dict(message.payloads)
        elif isinstance(message, Serving):
            slot.serving_since = time.monotonic()
            if slot.state == "starting":
                slot.state = "serving"
            import_modules(message.modules)
        elif isinstance(message, EngineDead):
            self._engine_dead = True
        elif isinstance(message, Leaving):
            slot.state = "leaving"

    def _on_end(self, slot: Slot) -> None:
        state, pid = slot.state, slot.process.pid
        slot.process.join()
        code = slot.process.exitcode
        self._forget(slot)
        if self._stopping or self._engine_dead:
            return
        if state == "retiring" and code == 0:
            return
        logger.error("API server %d (PID %d) died: %s", slot.index, pid, _how(code))
        if not self._ready:
            logger.error("API server %d died before the engine was up", slot.index)
            self._stop(status=1)
            return
        self._abort_requests(slot)
        if state == "retiring":
            return
        served = time.monotonic() - slot.serving_since if slot.serving_since else 0.0
        wait = slot.crashes.died(served)
        if wait is None:
            logger.error(
                "API server %d died %d times in a row within %.0f s of starting: giving up. The "
                "reason is in its log lines above.",
                slot.index,
                slot.crashes.patience,
                slot.crashes.settled_after_s,
            )
            self._stop(status=1)
        else:
            slot.start_at = time.monotonic() + wait

    def _forget(self, slot: Slot) -> None:
        assert slot.channel is not None
        self._selector.unregister(slot.process.sentinel)
        self._on_last_words(slot)
        slot.channel.close()
        slot.process.close()
        slot.process, slot.channel, slot.state = None, None, "empty"
        self._table.clear(slot.index)

    def _on_last_words(self, slot: Slot) -> None:
        """Read what a worker said before it ended, such as that the engine is dead."""
        assert slot.channel is not None
        if not slot.channel.closed:
            self._on_message(slot, slot.channel)
        if not slot.channel.closed:
            self._selector.unregister(slot.channel)

    def _abort_requests(self, dead: Slot) -> None:
        """Free the KV blocks of a dead worker's requests at once, through any that lives.

        The slot's next worker does it again, behind whatever the dead one had still sent.
        """
        for slot in self._slots:
            if slot.channel is not None and slot.state in ("serving", "retiring", "leaving"):
                slot.channel.send(AbortClient(dead.index))
                return

    # Following demand

    def _scale(self) -> None:
        now = time.monotonic()
        serving = [slot for slot in self._slots if slot.state == "serving"]
        coming = sum(slot.state == "starting" or slot.start_at is not None for slot in self._slots)
        busy = [self._table.activity(slot.index).busy for slot in serving]
        decision = self._policy.observe(now, busy, coming)
        if decision == "grow":
            self._grow("the others are busy")
        elif decision == "shrink":
            self._shrink("the others can do its work")
        if now > self._drain_at:
            self._drain_at = now + _DRAIN_EVERY_S
            for slot in self._slots:
                if slot.process is None:
                    _drop_waiting(slot)

    def _grow(self, why: str) -> None:
        """Start a worker in the first slot that is free, if one is and there is a future."""
        for slot in () if self._stopping else self._slots:
            if slot.state == "empty" and slot.start_at is None:
                logger.info("starting API server %d: %s", slot.index, why)
                slot.start_at = time.monotonic()
                return

    def _shrink(self, why: str) -> None:
        """Retire the worker with the fewest connections, unless there are as few as may be.

        Never slot 0: it gets the statistics that an engine sends when no worker has output.
        """
        serving = [slot for slot in self._slots if slot.state == "serving"]
        if len(serving) > self._policy.minimum:
            slot = min(serving[1:], key=self._connections)
            assert slot.channel is not None
            logger.info("retiring API server %d: %s", slot.index, why)
            slot.state = "retiring"
            slot.channel.send(Retire())

    def _connections(self, slot: Slot) -> int:
        return self._table.activity(slot.index).connections


def _drop_waiting(slot: Slot) -> None:
    for sock in slot.listeners.values():
        sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                sock.accept()[0].close()


def _how(code: int) -> str:
    return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def main(assignment: Assignment) -> None:
    """Be the supervisor; the target of the process that the main process starts."""
    if logging_config := getattr(assignment.job.args, "logging_config", None):
        from vllm.logger import configure_logging

        configure_logging(logging_config)

    from vllm.utils.system_utils import decorate_logs, set_process_title

    set_process_title("FrontendSupervisor")
    decorate_logs()
    status = Supervisor(assignment).run()
    # No finalisation: with a heap of this size it takes a second, and calls what is frozen leaked.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
