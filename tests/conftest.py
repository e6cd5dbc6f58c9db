"""Shared by all tests: a clean environment, and real vLLM servers."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Speed is not what tests assert, and machines that run them are busy.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("default")

# No test reaches for a model hub or reports usage, in this process or in the servers it starts.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

ROOT = Path(__file__).parents[1]
DEMO_MODEL = ROOT / "examples" / "demo_model"
OUR_VARIABLES = (
    "VLLM_PLUGINS",
    "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY",
    "SCALELLM_CONFIG",
    "SCALELLM_STATE",
    "SCALELLM_RESTARTED",
)
STARTUP_LIMIT_S = 300.0
"""A start takes 20-40 s on two idle cores; a machine under load may take several times that."""


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Undo every change of VLLM_PLUGINS and SCALELLM_* after the test; start without them."""
    for name in OUR_VARIABLES:
        # Set, then deleted: monkeypatch then restores "unset" even if the code under test sets it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@dataclass
class Server:
    """A running `vllm serve`. `pid` leads a process session of its own, so nothing can hide."""

    url: str
    pid: int
    log: Path

    def get(self, path: str) -> Any:
        """GET a JSON document; `HTTPError` on any status but 200."""
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST a JSON document and return the JSON answer."""
        with self.open(path, body) as response:
            return json.load(response)

    def open(self, path: str, body: dict[str, Any]) -> Any:
        """POST a JSON document and return the open response, for streams."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=120)

    def processes(self) -> dict[int, str]:
        """Every live process of the server: process id → title."""
        return _session(self.pid)


def _session(leader: int) -> dict[int, str]:
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:  # it ended while we looked
            continue
        state, session = fields[0], int(fields[3])
        if session == leader and state != "Z":
            found[int(folder.name)] = title
    return found


def _wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)  # polling another process: there is nothing to wait on
    return True


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _start(stack: ExitStack, log: Path, model: Path, *options: str, **environment: str) -> Server:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {name: value for name, value in os.environ.items() if name not in OUR_VARIABLES}
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=base | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    stack.callback(_stop, process)
    server = Server(f"http://127.0.0.1:{port}", process.pid, log)
    up = _wait_until(lambda: process.poll() is not None or _answers(server.url), STARTUP_LIMIT_S)
    if not up or process.poll() is not None:
        pytest.fail(f"server did not start (exit {process.poll()}):\n{log.read_text()[-6000:]}")
    return server


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a server as its operator would, and fail if anything of it is left behind."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(60)
    gone = _wait_until(lambda: not _session(process.pid), 30)
    left = _session(process.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert gone, f"left behind by a stopped server: {left}"


ServeFunction = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[ServeFunction]:
    """Start `vllm serve MODEL OPTIONS...` (environment as keywords); stopped after the test."""
    with ExitStack() as stack:
        yield lambda model, *options, **environment: _start(
            stack, tmp_path / "server.log", model, *options, **environment
        )


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model with every safe feature on, as `make serve` runs it."""
    log = tmp_path_factory.mktemp("demo_server") / "server.log"
    options = ("--plugins", "scalellm", "--served-model-name", "demo", "--enforce-eager")
    options += tuple(shlex.split(os.environ.get("SCALELLM_TEST_OPTIONS", "")))  # make test-modes
    with ExitStack() as stack:
        yield _start(stack, log, DEMO_MODEL, *options, "--max-model-len", "2048")


@pytest.fixture(scope="session")
def serve_together(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Server]]:
    """Start demo servers at the same time, one per NAME=OPTIONS; `stack` stops them.

    Each decodes with one thread: the servers would else wait for each other's spinning threads.
    """
    environment = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

    def start(stack: ExitStack, **servers: tuple[str, ...]) -> list[Server]:
        logs = tmp_path_factory.mktemp("servers")
        with ThreadPoolExecutor(len(servers)) as threads:
            jobs = [
                threads.submit(
                    _start, stack, logs / f"{name}.log", DEMO_MODEL, *options, **environment
                )
                for name, options in servers.items()
            ]
        return [job.result() for job in jobs]

    return start


@pytest.fixture
def probe_plugins(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Make installed plugins of vLLM that belong to nobody; returns the environment to use them.

    Called with NAME=SOURCE: a module whose `register()` vLLM calls. `note()` in it appends the
    name and the process's title to the file `notes` in tmp_path.
    """

    def install(**sources: str) -> dict[str, str]:
        site = tmp_path / "site"
        for name, source in sources.items():
            info = site / f"{name}-1.0.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(
                f"[vllm.general_plugins]\n{name} = {name}_module:register\n"
            )
            (site / f"{name}_module.py").write_text(_NOTE.format(name=name) + source)
        return {"PYTHONPATH": str(site), "PROBE_NOTES": str(tmp_path / "notes")}

    return install


_NOTE = '''
import os, pathlib
def note():
    """One line per call: plugin, process id."""
    with open(os.environ["PROBE_NOTES"], "a") as file:
        file.write("{name} %d\\n" % os.getpid())
'''
