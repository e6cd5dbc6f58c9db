"""Running simulations in processes of their own, side by side, and watching them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import msgspec

from scalellm_plugins.errors import ScaleLLMError

from . import policies
from .job import Job, Policy, Request, Run, Settings
from .process import MARK

REPORT_EVERY_S = 5.0
"""Real seconds between two lines about a run."""

_LOG_LINES = 30


class SimulationError(ScaleLLMError):
    """A run ended without a result."""


class _StoppedError(SimulationError):
    """It ended because another one did."""


def run_all(
    settings: Settings,
    chosen: Sequence[Policy],
    requests: list[Request],
    *,
    at_once: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Run]:
    """Run the workload under every policy, `at_once` at a time; return runs by label, in order.

    Raises:
        SimulationError: a run failed; the text has what its process said.
    """
    with tempfile.TemporaryDirectory(prefix="scalellm-simulate-") as folder:
        failed = threading.Event()
        watches = [
            _Watch(
                Job(settings=settings, policy=policy, requests=requests), Path(folder), say, failed
            )
            for policy in chosen
        ]
        with ThreadPoolExecutor(max_workers=at_once) as pool:
            try:
                futures = [pool.submit(watch.run) for watch in watches]
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # one failed, or Ctrl-C: the others' work is for nothing
                failed.set()
                for watch in watches:
                    watch.stop()
    errors = [error for future in futures if (error := future.exception())]
    if errors:
        raise next((one for one in errors if not isinstance(one, _StoppedError)), errors[0])
    return {policy.label: future.result() for policy, future in zip(chosen, futures, strict=True)}


class _Watch:
    """One process and what it says."""

    def __init__(
        self, job: Job, folder: Path, say: Callable[[str], None], failed: threading.Event
    ) -> None:
        self._job = job
        self._say = say
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        self._process: subprocess.Popen[str] | None = None
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._error = ""
        self._started = self._said = 0.0
        self._failed = failed
        """Set when any of the runs has failed."""

    def run(self) -> Run:
        """Run the process to its end.

        Raises:
            SimulationError: it ended without a result, or was stopped.
        """
        if self._failed.is_set():
            raise _StoppedError(self._label)
        try:
            return self._run()
        except BaseException:
            self._failed.set()
            raise

    def _run(self) -> Run:
        job, result = self._folder / "job", self._folder / "result"
        job.write_bytes(msgspec.msgpack.encode(self._job))
        self._started = self._said = time.monotonic()
        self._say(f"{self._label}: starting vLLM's engine")
        module = f"{__package__}.process"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(job), str(result)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=self._environment(),
            text=True,
            errors="replace",
        )
        if self._failed.is_set():  # meanwhile
            self._process.kill()
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._read(line.rstrip("\n"))
        if (code := self._process.wait()) or not result.exists():
            killed = self._failed.is_set() and code == -signal.SIGKILL
            raise (_StoppedError if killed else SimulationError)(self._failure())
        run = msgspec.msgpack.decode(result.read_bytes(), type=Run)
        self._say(f"{self._label}: {_clock(run.seconds)} simulated in {self._spent:.0f} s")
        return run

    def stop(self) -> None:
        """End the process if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    @property
    def _label(self) -> str:
        return self._job.policy.label

    @property
    def _spent(self) -> float:
        return time.monotonic() - self._started

    def _environment(self) -> dict[str, str]:
        ours = ("VLLM_PLUGINS", "VLLM_USE_RUST_FRONTEND")
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in ours and not name.startswith("SCALELLM_")
        }
        settings = self._job.settings
        gpu: dict[str, Any] = {"gpu": settings.gpu, "model": settings.model}
        for name in ("tensor_parallel", "kv_blocks"):
            if (value := getattr(settings, name)) is not None:
                gpu[name] = value
        fixed = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            # Sets of request ids are gone through in the order of their hashes.
            "PYTHONHASHSEED": "0",
        }
        return kept | fixed | policies.environment(self._job.policy, gpu)

    def _read(self, line: str) -> None:
        if not line.startswith(MARK):
            self._log.append(line)
            return
        message = json.loads(line.removeprefix(MARK))
        if "error" in message:
            self._error = message["error"]
            return
        now = time.monotonic()
        if now - self._said >= REPORT_EVERY_S and message["ended"]:
            self._said = now
            total = len(self._job.requests)
            self._say(
                f"{self._label}: {message['ended']:,} of {total:,} requests, "
                f"{_clock(message['at'])} of virtual time, {message['at'] / self._spent:.0f} times "
                "as fast"
            )

    def _failure(self) -> str:
        said = self._error or "its process ended without a result:\n" + "\n".join(self._log)
        return f"policy {self._label}: {said}"


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
