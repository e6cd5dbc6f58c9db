"""One worker: vLLM's own API server in a slot of the supervisor's.

The process is forked from the supervisor with everything imported, runs vLLM's
`run_server_worker`, and adds what makes workers replaceable: it hands the engines' ready messages
to the supervisor, says how busy it is, and retires without dropping a connection. The patches of
vLLM's client and server call the hooks here; outside a worker `current()` is None and they do
nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import shared_values
from .slots import NOT_ACCEPTING, Activity, SlotTable
from .supervised_client import abort_client, expect_no_reset
from .supervision import AbortClient, Channel, EngineDead, EngineReady, Leaving, Retire, Serving

logger = logging.getLogger("vllm.scalellm")

PUBLISH_EVERY_S = 0.25
"""How often a worker says how busy it is; the policy needs a few samples per second."""

_DRAIN_CHECK_S = 0.05

_LAST_WORDS_S = 1.0
"""How long clients of aborted requests have to read that they were."""

_CLOSE = (b"connection", b"close")
_MODULES_TOLD = 2000
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What every worker serves: vLLM's own arguments, as its API server processes get them.

    `client_config` holds what is the same for all workers. `sock` is bound, and
    its listeners are all workers.
    """

    listen_address: str
    sock: socket.socket
    args: Namespace
    client_config: dict[str, Any]


@dataclass
class Worker:
    """This process's slot, and what was learnt while it came up."""

    index: int
    slots: SlotTable
    channel: Channel
    listeners: dict[str, int]
    """ZMQ address → descriptor of the listening socket that the slot's workers adopt in turn."""

    ready: dict[bytes, bytes]
    """What each engine said when it was ready; empty in the first workers, which hear it."""

    job: Job
    known_modules: frozenset[str] = field(default_factory=lambda: frozenset(sys.modules))
    client: Any = None
    server: Any = None
    retiring: bool = False
    stopping: bool = False
    unfinished: Callable[[], int] = lambda: 0
    """How much work there is that no connection waits for."""

    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    # What the patches of vLLM call

    def engines_ready(self, client: Any, payloads: dict[bytes, bytes]) -> None:
        """The client is connected to every engine; `payloads` are their ready messages."""
        if self.ready:
            expect_no_reset(client)
        self.client = client
        shared_values.clock.follow(client)
        self.ready = payloads
        self.channel.send(EngineReady(list(payloads.items())))

    def server_started(self, server: Any) -> None:
        """uvicorn accepts connections."""
        self.server = server
        for number in (signal.SIGTERM, signal.SIGINT):  # in place of vLLM's handlers
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        fresh = sorted(set(sys.modules) - self.known_modules)[:_MODULES_TOLD]
        self.channel.send(Serving(fresh))
        if self.retiring:
            self._start(self._retire())

    # The life of the process

    async def serve(self) -> None:
        """Serve until told to leave, by the supervisor or by a signal."""
        from vllm.entrypoints.launchers.api_server.entry import run_server_worker

        loop = asyncio.get_running_loop()
        loop.add_reader(self.channel.fileno(), self._on_message)
        self._start(self._publish())
        config = {**self.job.client_config, "client_index": self.index}
        inputs, outputs = self.listeners
        config |= {"input_address": inputs, "output_address": outputs}
        try:
            await run_server_worker(
                self.job.listen_address, self.job.sock, self.job.args, config, **uvicorn_options()
            )
        finally:
            loop.remove_reader(self.channel.fileno())
            for task in self._tasks:
                task.cancel()

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)

    def _on_message(self) -> None:
        for message in self.channel.receive():
            if isinstance(message, Retire) and not self.retiring:
                self.retiring = True
                if self.server is not None:
                    self._start(self._retire())
            elif isinstance(message, AbortClient) and self.client is not None:
                self._start(abort_client(self.client, message.index))
        if self.channel.closed:
            # No supervisor: end as if it had said so.
            asyncio.get_running_loop().remove_reader(self.channel.fileno())
            os.kill(os.getpid(), signal.SIGTERM)

    async def _publish(self) -> None:
        told = False
        wanted, wall = _cpu_wanted_s(), time.monotonic()
        while True:
            await asyncio.sleep(PUBLISH_EVERY_S)
            before, wanted = wanted, _cpu_wanted_s()
            since, wall = wall, time.monotonic()
            connections = len(self.server.server_state.connections) if self.server else 0
            busy = min(1.0, (wanted - before) / (wall - since))
            self.slots.publish(self.index, Activity(busy, connections, wall))
            if not told and self.client is not None and self.client.resources.engine_dead:
                told = True
                self.channel.send(EngineDead())

    # Retiring

    async def _retire(self) -> None:
        """Accept no more, answer what comes on open connections, and leave when all are closed.

        Every response from now on says `connection: close`, so that its client opens its next
        connection with another worker. Connections that idle run into vLLM's usual timeout; closing
        them at once would race with a request that is on its way.
        """
        server = self.server
        self._stop_accepting()
        silent = set(server.server_state.connections)
        patience = time.monotonic() + server.config.timeout_keep_alive
        while self._is_needed():
            await asyncio.sleep(_DRAIN_CHECK_S)
            if silent and time.monotonic() > patience:
                _close_silent(silent & server.server_state.connections)
                silent = set()
        logger.info("API server %d retired", self.index)
        server.should_exit = True

    def _is_needed(self) -> bool:
        server = self.server
        connecting = getattr(server, "_connecting", 0)
        return bool(server.server_state.connections or connecting or self.unfinished())

    def _stop_accepting(self) -> None:
        server = self.server
        if _CLOSE in server.config.encoded_headers:
            return
        for listener in getattr(server, "servers", ()):  # before vLLM 0.32: asyncio's own
            listener.close()
        for task in list(getattr(server, "_accept_tasks", ())):
            # Connections being set up (a TLS handshake) are tracked there too, and go on.
            if task.get_coro().__name__ == "_accept":
                task.cancel()
        if getattr(server, "peer_loads", None) is not None:
            # Written again whenever a connection opens or closes: from now on, to nobody.
            loads, index = server.peer_loads
            server.peer_loads = (list(loads), index)
        self.slots.loads[self.index] = NOT_ACCEPTING
        # uvicorn renews the one from the other every second.
        server.config.encoded_headers.append(_CLOSE)
        server.server_state.default_headers = [*server.server_state.default_headers, _CLOSE]

    # Ending

    def _on_signal(self) -> None:
        # Often more than one: to the whole process group, and from the supervisor.
        if not self.stopping:
            self.stopping = True
            self._start(self._stop())

    async def _stop(self) -> None:
        """Accept no more, let what runs go on for `--shutdown-timeout` seconds, and end the rest.

        vLLM's handler begins with closing the connection to an engine that is not its own, and then
        waits for streams that nothing ends. Here it is as in vLLM's single process: they go on, and
        those that are aborted say so.
        """
        self._stop_accepting()
        self.channel.send(Leaving())
        server, client = self.server, self.client
        deadline = time.monotonic() + client.vllm_config.shutdown_timeout
        while self._is_needed() and time.monotonic() < deadline:
            if client.resources.engine_dead or self.channel.closed:
                break  # nobody is left to finish anything
            for connection in list(server.server_state.connections):
                if hasattr(connection, "cycle"):  # not a websocket, whose session goes on
                    connection.shutdown()  # after its answer, if it waits for one
            await asyncio.sleep(_DRAIN_CHECK_S)
        await self._abort_requests()
        deadline = time.monotonic() + _LAST_WORDS_S
        while server.server_state.connections and time.monotonic() < deadline:
            for connection in list(server.server_state.connections):
                connection.shutdown()
            await asyncio.sleep(_DRAIN_CHECK_S)
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        server.should_exit = True

    async def _abort_requests(self) -> None:
        engine_client = self.server.config.app.state.engine_client
        requests = list(engine_client.output_processor.request_states)
        if requests:
            logger.info("API server %d: aborting %d requests", self.index, len(requests))
            try:
                await engine_client.abort(requests, internal=True)
            except Exception:
                logger.exception("requests could not be aborted")


def _cpu_wanted_s() -> float:
    """For how long this thread has run, or could have run had a core been free.

    Where cores are short a loop that never rests gets half of one, and would pass for idle.
    """
    try:
        with open(f"/proc/self/task/{os.getpid()}/schedstat") as file:
            ran, waited, _ = file.read().split()
    except (OSError, ValueError):  # a kernel without scheduler statistics
        return time.thread_time()
    return (int(ran) + int(waited)) / 1e9


def _close_silent(connections: set[Any]) -> None:
    """Close connections that never carried a request: no timeout of uvicorn's covers them."""
    for connection in connections:
        if getattr(connection, "cycle", True) is None:
            connection.shutdown()


_current: Worker | None = None


def current() -> Worker | None:
    """The worker that this process is, or None."""
    return _current


def uvicorn_options() -> dict[str, Any]:
    """Keywords that an API server of ours adds to uvicorn's configuration."""
    try:
        from .connection import FastLaneProtocol
    except ImportError:
        return {}
    return {"http": FastLaneProtocol}


def run(worker: Worker) -> None:
    """Be this worker until it ends; the target of the forked process.

    Called with the termination signals blocked, which they are across the fork so that the
    supervisor's own handlers never see one that is meant for the worker.
    """
    global _current
    _current = worker
    die_with_parent()
    shared_values.bind(worker.slots.state.series[worker.index])
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})

    import uvloop
    from vllm import plugins
    from vllm.utils.system_utils import decorate_logs, set_process_title

    # Every process of vLLM calls every plugin; that the supervisor did counts for the supervisor.
    plugins.plugins_loaded = False
    set_process_title("APIServer", str(worker.index))
    decorate_logs()
    uvloop.run(worker.serve())


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent dies, however it does.

    The channel's end says the same, but only to an event loop that runs; while a worker connects to
    its engines it does not.
    """
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent or parent == 1:
        os.kill(os.getpid(), signal.SIGTERM)
