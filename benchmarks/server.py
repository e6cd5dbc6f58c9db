"""A server under test: started in a session of its own, watched, and surely gone afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from scalellm_plugins.errors import ScaleLLMError

from . import procstat
from .systems import System, Target, command, environment

_PR_SET_PDEATHSIG = 1
_GRACE_S = 12.0  # for a server to end its engine by itself
_EXCEPTION = re.compile(r"(^|[\])] )[\w.]*(Error|Exception): ")
_NOISE = re.compile(r"nanobind|^ - (leaked|\.\.\.)")
_libc = ctypes.CDLL(None, use_errno=True)


class ServerError(ScaleLLMError):
    """A server did not start, or is no longer there."""


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_parent(number: int) -> Callable[[], None]:
    """Return a `preexec_fn` that has the child sent signal `number` when its parent is gone.

    The kernel takes the thread that forks for the parent, so use it in the main thread only.
    """

    def arm() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)

    return arm


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP end this process by an exception, so that servers are stopped."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


class Server:
    """One system's server. `start` it from the main thread, and `stop` it whatever happens."""

    host = "127.0.0.1"

    def __init__(self, system: System, target: Target, logs: Path) -> None:
        self.system = system
        self.port = free_port()
        self.log = logs / f"{system.name}.log"
        self.command = command(system, target, self.port)
        self._env = environment(system, target)
        self._process: subprocess.Popen[bytes] | None = None
        self._shared_memory: set[Path] = set()
        self._openmp: set[Path] = set()

    @property
    def pid(self) -> int:
        """Process id of the `vllm serve` process."""
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    def start(self) -> None:
        """Start the processes; the server is not ready yet."""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),
            )

    def wait_ready(self, timeout_s: float, progress: Callable[[float], None]) -> None:
        """Return when the server answers `GET /health`; `progress` gets the seconds it took so far.

        Raises:
            ServerError: it ended, or was not ready in time; the text has the end of its log.
        """
        started = time.monotonic()
        while not self._healthy():
            waited = time.monotonic() - started
            if not self.alive():
                raise ServerError(f"{self.system.name} ended while starting.\n{self.log_tail()}")
            if waited > timeout_s:
                raise ServerError(
                    f"{self.system.name} was not ready within {timeout_s:g} s "
                    f"(--start-timeout).\n{self.log_tail()}"
                )
            progress(waited)
            time.sleep(0.25)
        self._note_shared_memory()

    def alive(self) -> bool:
        """Say whether the `vllm serve` process still runs."""
        return self._process is not None and self._process.poll() is None

    def processes(self) -> list[int]:
        """Return the ids of all of the server's processes."""
        return list(procstat.process_tree(self.pid))

    def log_tail(self, lines: int = 25) -> str:
        """Return the log's path, its first error and its last lines, indented."""
        text = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        text = [line for line in text if not _NOISE.search(line)]
        # The first exception is the cause; what comes last is the parent losing its children.
        first = next((line for line in text if _EXCEPTION.search(line)), "")
        shown = ([f"first error: {first}", "…"] if first else []) + text[-lines:]
        return "\n".join([f"  {self.log}:", *(f"    {line}" for line in shown)])

    def _note_shared_memory(self) -> None:
        processes = self.processes()
        self._shared_memory |= procstat.shared_memory_files(processes)
        # Intel's OpenMP, which torch loads, leaves one of these behind in a process that is killed.
        self._openmp |= {
            Path(f"/dev/shm/__KMP_REGISTERED_LIB_{pid}_{os.getuid()}") for pid in processes
        }

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def terminate(self) -> None:
        """Ask the server to end, without waiting."""
        if self.alive():
            self._note_shared_memory()
            os.kill(self.pid, signal.SIGTERM)

    def stop(self) -> list[str]:
        """End all processes and remove what they left in /dev/shm; return what was left, in words.

        Asks first, because vLLM's parent ends its engine in order; what is still there after
        `_GRACE_S` is killed, be it a child that has lost its parent.
        """
        if self._process is None:
            return []
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        left = self._kill_rest()
        self._process.wait()
        notes = [f"{self.system.name}: had to kill {name}" for name in left]
        for path in self._openmp:
            path.unlink(missing_ok=True)
        for path in sorted(self._shared_memory - self._openmp):
            if path.exists():
                path.unlink(missing_ok=True)
                notes.append(f"{self.system.name}: removed {path}")
        return notes

    def _kill_rest(self) -> list[str]:
        """Kill what is left of the session, and return the titles."""
        titles: list[str] = []
        deadline = time.monotonic() + 2  # children may be on their way out
        while left := procstat.process_tree(self.pid):
            if time.monotonic() > deadline:
                titles += [procstat.title(pid) or str(pid) for pid in left]
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                deadline = time.monotonic() + 2
            time.sleep(0.05)
        return titles


def stop_all(servers: Sequence[Server]) -> list[str]:
    """Stop servers side by side; return the notes of all."""
    for server in servers:
        server.terminate()
    return [note for server in servers for note in server.stop()]
