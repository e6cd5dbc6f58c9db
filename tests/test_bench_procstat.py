"""What the operating system says about processes, against children of known behaviour."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scalellm_plugins.benchmarks import procstat
from scalellm_plugins.benchmarks.server import die_with_parent

BURN = """
import sys, threading, time
def burn(seconds):
    start = time.thread_time()
    while time.thread_time() - start < seconds:
        pass
print("ready", flush=True); sys.stdin.readline()
thread = threading.Thread(target=burn, args=(0.15,)); thread.start(); thread.join()
burn(0.15)
print("done", flush=True); sys.stdin.readline()
"""


@contextmanager
def child(code: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_threads_that_have_ended_count() -> None:
    with child(BURN) as process:
        assert wait_line(process) == "ready"
        meter = procstat.CpuMeter(process.pid)
        meter.start()
        tell(process)
        assert wait_line(process) == "done"
        used = meter.stop()
    # The child has measured 0.30 s itself; what it needs besides is printing and a thread.
    assert 0.29 < used["frontend"] < 0.45
    assert used["engine"] == 0


def test_a_process_that_appears_counts_in_full_and_by_role() -> None:
    code = """
import subprocess, sys, time
print("ready", flush=True); sys.stdin.readline()
inner = ("import time; start = time.process_time()\\n"
         "while time.process_time() - start < 0.1: pass\\n"
         "print('done', flush=True); time.sleep(60)")
child = subprocess.Popen(["VLLM::EngineCore", "-c", inner], executable=sys.executable,
                         stdout=subprocess.PIPE)
child.stdout.readline()
print("done", flush=True)
sys.stdin.readline()
child.kill(); child.wait()
"""
    with child(code) as process:
        assert wait_line(process) == "ready"
        meter = procstat.CpuMeter(process.pid)
        meter.start()
        tell(process)
        assert wait_line(process) == "done"
        meter.poll()
        used = meter.stop()
        assert sorted(procstat.process_tree(process.pid).values()) == ["engine", "frontend"]
        tell(process)
        process.wait(10)
    assert used["engine"] > 0.1


def test_an_orphan_of_the_session_is_found() -> None:
    code = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
os._exit(0)
"""
    with child(code) as process:
        orphan = int(wait_line(process))
        process.wait(10)
        assert list(procstat.process_tree(process.pid)) == [orphan]
        os.kill(orphan, signal.SIGKILL)


def test_no_such_process() -> None:
    with child("") as process:
        process.wait(10)
    with pytest.raises(ProcessLookupError):
        procstat.cpu_seconds(process.pid)
    assert procstat.process_tree(process.pid) == {}
    assert procstat.peak_rss_bytes([process.pid]) == 0
    assert procstat.title(process.pid) == ""


def test_peak_memory_starts_again() -> None:
    code = """
import sys
def hold(): bytearray(64_000_000)
hold(); print("freed", flush=True); sys.stdin.readline()
hold(); print("again", flush=True); sys.stdin.readline()
"""
    with child(code) as process:
        assert wait_line(process) == "freed"
        first = procstat.peak_rss_bytes([process.pid])
        procstat.reset_peak_rss([process.pid])
        low = procstat.peak_rss_bytes([process.pid])
        assert first - low > 40_000_000
        tell(process)
        assert wait_line(process) == "again"
        assert procstat.peak_rss_bytes([process.pid]) - low > 40_000_000
        assert 0 < procstat.pss_bytes([process.pid]) <= first


def test_shared_memory_files_are_found(tmp_path: Path) -> None:
    code = """
import mmap, sys
with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    kept = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True); sys.stdin.readline()
"""
    path = Path("/dev/shm") / f"scalellm-test-{os.getpid()}-{tmp_path.name}"
    try:
        with child(code, str(path)) as process:
            assert wait_line(process) == "mapped"
            assert procstat.shared_memory_files([process.pid]) == {path}
    finally:
        path.unlink(missing_ok=True)


def test_a_child_dies_with_its_parent() -> None:
    code = f"""
import signal, subprocess, sys
from {die_with_parent.__module__} import die_with_parent
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                         preexec_fn=die_with_parent(signal.SIGKILL))
print(child.pid, flush=True)
sys.stdin.readline()
"""
    with child(code) as process:
        inner = int(wait_line(process))
        assert inner in procstat.process_tree(process.pid)
        process.kill()
        process.wait(10)
        watch = os.pidfd_open(inner) if _exists(inner) else None
        if watch is not None:
            import select

            assert select.select([watch], [], [], 10)[0]
            os.close(watch)
    assert inner not in procstat.process_tree(process.pid)


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("VLLM::EngineCore", "engine"),
        ("VLLM::EngineCore_DP0", "engine"),
        ("VLLM::Worker_TP1", "engine"),
        ("VLLM::DPCoordinator", "engine"),
        ("VLLM::APIServer_1", "frontend"),
        ("/usr/bin/python3 /venv/bin/vllm serve VLLM::EngineCore --port 1", "frontend"),
        ("/opt/vllm-rs serve --model x", "frontend"),
        ("", "frontend"),
    ],
)
def test_roles(title: str, role: str) -> None:
    assert procstat.role_of(title) == role
