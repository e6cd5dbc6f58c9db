"""The supervisor with workers that only say what they are told to: no vLLM, no engine.

Each test runs a supervisor in a process of its own, as the main process would, and reads what its
workers report on a pipe.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Iterator
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from scalellm_plugins.frontends import supervisor as supervisor_module
from scalellm_plugins.frontends.scaling import CrashLoop
from scalellm_plugins.frontends.slots import NOT_ACCEPTING, Activity, SlotTable
from scalellm_plugins.frontends.supervised import listen
from scalellm_plugins.frontends.supervision import (
    AbortClient,
    Channel,
    EngineDead,
    EngineReady,
    Leaving,
    Retire,
    Serving,
)
from scalellm_plugins.frontends.supervisor import Assignment, Supervisor
from scalellm_plugins.frontends.worker import Job, Worker, die_with_parent

LIMIT_S = 60.0
"""How long a test waits for a report that must come; nothing is measured."""


class ScriptedWorker:
    """What a worker does here: reports its messages, and obeys what the test sends it."""

    def __init__(self, worker: Worker, reports: Connection, behaviour: str) -> None:
        self.worker = worker
        self.reports = reports
        self.behaviour = behaviour

    def run(self) -> None:
        die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, lambda *_: self.told_to_end())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        index, channel = self.worker.index, self.worker.channel
        if self.behaviour not in ("silent", "crash"):
            channel.send(EngineReady([(b"\0\0", b"ready")]))
            channel.send(Serving([]))
        fds = len(os.listdir("/proc/self/fd"))
        self.reports.send((index, os.getpid(), "up", (dict(self.worker.ready), fds)))
        if self.behaviour == "crash":
            os._exit(7)
        if self.behaviour == "engine dies":
            channel.send(EngineDead())
            os._exit(0)
        while not channel.closed:
            wait([channel])
            for message in channel.receive():
                self.reports.send((index, os.getpid(), type(message).__name__, message))
                if isinstance(message, Retire):
                    os._exit(0)

    def told_to_end(self) -> None:
        if self.behaviour not in ("drains", "does not hear"):
            os._exit(0)
        if self.behaviour == "drains":
            self.worker.channel.send(Leaving())
        self.reports.send((self.worker.index, os.getpid(), "told", None))


class Harness:
    """A supervisor in a child process, and the reports of its workers."""

    def __init__(self, slots: int, minimum: int, behaviours: dict[int, str]) -> None:
        self.reports, theirs = Pipe(duplex=False)
        sockets = [listen("tcp://127.0.0.1:0") for _ in range(2 * slots)]
        pairs = [(entry.address, entry.socket) for entry in sockets]
        self.listening = socket.create_server(("127.0.0.1", 0))
        job = Job("http://x", self.listening, Namespace(), {"client_count": slots})
        assignment = Assignment(job, pairs[:slots], pairs[slots:], minimum, admission=True)
        self.process = get_context("fork").Process(
            target=_supervise, args=(assignment, theirs, behaviours)
        )
        self.process.start()
        theirs.close()
        for entry in sockets:
            entry.cleanup()

    def report(self) -> tuple[int, int, str, Any]:
        """The next report: (slot, process id, what, details)."""
        assert self.reports.poll(LIMIT_S), "no report"
        return self.reports.recv()

    def up(self, count: int) -> dict[int, int]:
        """Wait until so many workers came up: slot → process id."""
        found: dict[int, int] = {}
        while len(found) < count:
            index, pid, what, _ = self.report()
            if what == "up":
                found[index] = pid
        return found

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def ended(self) -> int | None:
        self.process.join(LIMIT_S)
        return self.process.exitcode

    def refuses(self) -> bool:
        """Whether a client is refused, rather than let wait for somebody to accept it."""
        try:
            socket.create_connection(self.listening.getsockname(), LIMIT_S).close()
        except ConnectionRefusedError:
            return True
        return False


def _supervise(assignment: Assignment, reports: Connection, behaviours: dict[int, str]) -> None:
    supervisor_module.warm_up = lambda job: None  # type: ignore[attr-defined]
    supervisor_module.run = lambda worker: ScriptedWorker(  # type: ignore[assignment]
        worker, reports, behaviours.get(worker.index, "serve")
    ).run()
    supervisor = Supervisor(assignment)
    for slot in supervisor._slots:
        slot.crashes = CrashLoop(patience=3, settled_after_s=1e-9)
    sys.exit(supervisor.run())


@pytest.fixture
def start() -> Iterator[Any]:
    made: list[Harness] = []

    def make(slots: int, minimum: int, **behaviours: str) -> Harness:
        named = {int(name.removeprefix("slot")): value for name, value in behaviours.items()}
        made.append(Harness(slots, minimum, named))
        return made[-1]

    yield make
    for harness in made:
        if harness.process.is_alive():
            harness.process.kill()
        harness.process.join()


def _gone(pid: int) -> bool:
    """Wait for the end of a process that is not our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(wait([descriptor], LIMIT_S))
    finally:
        os.close(descriptor)


def test_it_starts_the_minimum_and_ends_them_on_a_signal(start: Any) -> None:
    harness = start(3, 2)
    workers = harness.up(2)
    assert set(workers) == {0, 1}
    harness.signal(signal.SIGTERM)
    assert harness.ended() == 0
    assert all(_gone(pid) for pid in workers.values())
    with pytest.raises(EOFError):  # nobody is left who could report
        harness.report()


def test_connections_are_refused_when_no_worker_accepts_any_more(start: Any) -> None:
    """And before that: while one still does, it would take the end of its socket for an error."""
    harness = start(3, 3, slot0="drains", slot1="drains", slot2="does not hear")
    workers = harness.up(3)
    # The supervisor knows the workers as accepting once it has read what they said, before this.
    harness.signal(signal.SIGTERM)
    told = [harness.report() for _ in range(3)]
    assert {index for index, _, what, _ in told if what == "told"} == {0, 1, 2}
    assert not harness.refuses()
    os.kill(workers[2], signal.SIGKILL)
    deadline = time.monotonic() + LIMIT_S
    while not harness.refuses():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert harness.process.is_alive(), "it waits for those that still have something to say"
    for index in (0, 1):
        os.kill(workers[index], signal.SIGKILL)
    assert harness.ended() == 0


def test_a_dead_worker_is_replaced_with_what_the_engines_said_and_its_requests_aborted(
    start: Any,
) -> None:
    harness = start(2, 2)
    workers = harness.up(2)
    os.kill(workers[1], signal.SIGKILL)
    reports = [harness.report(), harness.report()]
    by_slot = {index: (pid, what, details) for index, pid, what, details in reports}
    assert by_slot[0] == (workers[0], "AbortClient", AbortClient(1))
    pid, what, (ready, _) = by_slot[1]
    assert (what, ready) == ("up", {b"\0\0": b"ready"})
    assert pid != workers[1]


def test_workers_do_not_inherit_each_others_descriptors(start: Any) -> None:
    """Replacing leaks none: the tenth worker of a slot has as many as its first replacement."""
    harness = start(2, 2)
    workers = harness.up(2)
    counts = []
    for _ in range(10):
        os.kill(workers[1], signal.SIGKILL)
        while True:
            index, pid, what, details = harness.report()
            if what == "up":
                break
        workers[index] = pid
        counts.append(details[1])
    assert len(set(counts)) == 1, counts


def test_a_worker_that_keeps_dying_ends_the_server(start: Any) -> None:
    harness = start(2, 1, slot1="crash")
    harness.up(1)
    harness.signal(signal.SIGTTIN)
    crashed = [harness.report() for _ in range(5)]
    assert [index for index, _, what, _ in crashed if what == "up"] == [1, 1, 1]
    assert harness.ended() == 1


def test_a_death_before_the_engine_is_up_ends_the_start(start: Any) -> None:
    harness = start(2, 2, slot0="silent", slot1="crash")
    workers = harness.up(2)
    assert harness.ended() == 1
    assert all(_gone(pid) for pid in workers.values())


def test_signals_add_and_retire_within_the_bounds(start: Any) -> None:
    harness = start(3, 1)
    first = harness.up(1)
    harness.signal(signal.SIGTTOU)  # there is only one
    harness.signal(signal.SIGTTIN)
    second = harness.up(1)
    assert set(second) == {1}
    while not harness.reports.poll(0.1):  # to be retired, it must be known to serve
        harness.signal(signal.SIGTTOU)
    index, pid, what, _ = harness.report()
    assert (index, pid, what) == (1, second[1], "Retire")
    assert _gone(second[1])
    harness.signal(signal.SIGTTIN)
    assert set(harness.up(1)) == {1}
    harness.signal(signal.SIGTERM)
    assert harness.ended() == 0
    assert _gone(first[0])


def test_when_the_engine_is_dead_workers_are_not_replaced(start: Any) -> None:
    harness = start(1, 1, slot0="engine dies")
    harness.up(1)
    assert harness.ended() == 0


def test_workers_end_with_the_supervisor(start: Any) -> None:
    harness = start(2, 2)
    workers = harness.up(2)
    harness.signal(signal.SIGKILL)
    assert all(_gone(pid) for pid in workers.values())


def test_supervisor_and_workers_end_with_the_main_process(tmp_path: Path) -> None:
    """The main process is killed, so it can end nobody."""
    script = textwrap.dedent(
        f"""
        import os, signal, sys, importlib.util
        spec = importlib.util.spec_from_file_location("harness", {str(Path(__file__))!r})
        harness = importlib.util.module_from_spec(spec)
        sys.modules["harness"] = harness
        spec.loader.exec_module(harness)
        started = harness.Harness(2, 2, {{}})
        print(started.process.pid, *started.up(2).values(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with (tmp_path / "out").open("w+") as out:
        subprocess.run([sys.executable, "-c", script], env=environment, stdout=out, check=False)
        out.seek(0)
        pids = [int(word) for word in out.read().split()]
    assert len(pids) == 3
    assert all(_gone(pid) for pid in pids)


def test_a_channel_carries_messages_and_the_others_end() -> None:
    one, other = Channel.pair()
    sent = [EngineReady([(b"\1\0", b"x" * 1000)]), Serving(["m"] * 2000), EngineDead()]
    for message in sent:
        one.send(message)
    assert list(other.receive()) == sent
    assert not other.closed
    one.close()
    assert list(other.receive()) == []
    assert other.closed
    other.send(Retire())  # to nobody: no error
    other.close()


def test_a_peer_that_does_not_read_does_not_block_the_supervisor() -> None:
    one, other = Channel.pair()
    for index in range(100_000):
        one.send(AbortClient(index))
    received = list(other.receive())
    assert received[: len(received)] == [AbortClient(index) for index in range(len(received))]
    one.close()
    other.close()


def test_the_slot_table_is_shared_and_laid_out_as_it_says() -> None:
    table = SlotTable(5)
    assert list(table.loads) == [NOT_ACCEPTING] * 5
    child = get_context("fork").Process(
        target=lambda: (
            table.publish(3, Activity(0.25, 7, 12.5)),
            table.loads.__setitem__(3, 7),
            table.admission.__setitem__(3 * 8, 9),
        )
    )
    child.start()
    child.join()
    assert table.activity(3) == Activity(0.25, 7, 12.5)
    assert [index for index in range(5) if table.activity(index) != Activity(0, 0, 0)] == [3]
    assert list(table.loads) == [NOT_ACCEPTING] * 3 + [7, NOT_ACCEPTING]
    assert sum(table.admission) == 9
    table.clear(3)
    assert list(table.loads) == [NOT_ACCEPTING] * 5
    assert sum(table.admission) == 0
    assert table.activity(3) == Activity(0, 0, 0)


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_a_listener_is_bound_and_leaves_nothing(scheme: str, tmp_path: Path) -> None:
    address = {"tcp": "tcp://127.0.0.1:0", "ipc": f"ipc://{tmp_path}/new/folder/socket"}[scheme]
    listener = listen(address)
    if scheme == "tcp":
        host, port = listener.address.removeprefix("tcp://").split(":")
        assert port != "0"
        socket.create_connection((host, int(port))).close()
    else:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(listener.address.removeprefix("ipc://"))
    listener.cleanup()
    listener.cleanup()
    assert not list((tmp_path / "new" / "folder").glob("*") if scheme == "ipc" else [])
