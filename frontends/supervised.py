"""vLLM's view of a supervised frontend: one process in place of its API servers.

`run_multi_api_server` makes a manager of API server processes, watches `processes` and calls
`shutdown`. This one starts the supervisor, which forks and replaces the workers.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import weakref
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from scalellm_plugins import config

from .supervisor import Assignment, main
from .worker import Job

_GRACE_S = 2.0
"""How long the workers have to leave, when the time for what is running is over."""


@dataclass(frozen=True)
class Listener:
    """A listening socket for ZMQ, bound here and adopted by the slot's workers."""

    address: str
    socket: socket.socket

    def cleanup(self) -> None:
        """Close the socket and remove its file, as vLLM does since 0.32."""
        self.socket.close()
        if self.address.startswith("ipc://"):
            with suppress(FileNotFoundError):
                os.unlink(self.address.removeprefix("ipc://"))


def listen(address: str) -> Listener:
    """Bind and listen on a ZMQ address; port 0 becomes the port that the kernel chose.

    Raises:
        OSError: the address cannot be bound.
    """
    scheme, _, rest = address.partition("://")
    if scheme == "ipc":
        os.makedirs(os.path.dirname(rest), exist_ok=True)
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        bound.bind(rest)
    else:
        assert scheme == "tcp", address
        host, _, port = rest.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.bind((host, int(port)))
        chosen = bound.getsockname()[1]
        address = f"tcp://[{host}]:{chosen}" if ":" in host else f"tcp://{host}:{chosen}"
    bound.listen()
    return Listener(address, bound)


class SupervisedServers:
    """What vLLM's `APIServerProcessManager` is to `run_multi_api_server`.

    Takes its keywords: `input_listeners` and `output_listeners` since 0.32, addresses before.
    """

    def __init__(
        self,
        listen_address: str,
        sock: socket.socket,
        args: Namespace,
        num_servers: int,
        input_listeners: Sequence[Any] = (),
        output_listeners: Sequence[Any] = (),
        input_addresses: Sequence[str] = (),
        output_addresses: Sequence[str] = (),
        stats_update_address: str | None = None,
        tensor_queue: Any = None,
    ) -> None:
        inputs = list(input_listeners) or [listen(address) for address in input_addresses]
        outputs = list(output_listeners) or [listen(address) for address in output_addresses]
        self._listeners = [*inputs, *outputs]
        self._addresses = [entry.address for entry in inputs], [o.address for o in outputs]
        shared = {
            "client_count": num_servers,
            "stats_update_address": stats_update_address,
            "tensor_queue": tensor_queue,
        }
        given = {name: value for name, value in shared.items() if value is not None}
        assignment = Assignment(
            job=Job(listen_address, sock, args, given),
            inputs=[(entry.address, entry.socket) for entry in inputs],
            outputs=[(entry.address, entry.socket) for entry in outputs],
            minimum=config.current().frontend.min_workers or num_servers,
            admission=getattr(args, "max_num_queued_reqs", None) is not None,
        )
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=main, name="FrontendSupervisor", args=(assignment,))
        self.processes = [process]
        self._finalizer = weakref.finalize(self, _end, self.processes, self._listeners, None)
        with _single_threaded_imports():
            process.start()
        for entry in self._listeners:
            entry.socket.close()

    def gather_actual_addresses(self) -> tuple[list[str], list[str]]:
        """Before vLLM 0.32: where the engines connect to; bound here, so there is no waiting."""
        return self._addresses

    def shutdown(self, timeout: float | None = None) -> None:
        """End supervisor and workers, by force after `timeout` seconds."""
        if self._finalizer.detach() is not None:
            _end(self.processes, self._listeners, timeout)


def _end(processes: list[Any], listeners: list[Any], timeout: float | None) -> None:
    from vllm.v1.utils import shutdown

    try:
        shutdown(processes, timeout=None if timeout is None else timeout + _GRACE_S)
    finally:
        for entry in listeners:
            entry.cleanup()


@contextmanager
def _single_threaded_imports() -> Iterator[None]:
    """Keep numpy's OpenBLAS from starting threads in the process that is started within.

    Its pool starts when numpy is imported, which is before any code of ours runs there, and a
    process that forks should have no threads. What the user has set is left alone.
    """
    name = "OPENBLAS_NUM_THREADS"
    before = os.environ.get(name)
    os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
