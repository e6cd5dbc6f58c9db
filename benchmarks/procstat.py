"""CPU time and memory of a server's processes, by role, as the operating system counts them.

CPU time is read from each process's CPU clock (`clock_getcpuclockid(3)`): nanoseconds, all threads,
including those that have ended. What else /proc has is worse: `stat`'s utime + stime come in ticks
of 10 ms, and `schedstat` counts one thread, so a thread that ends in the window takes its time with
it. A read costs 0.6 µs.

Peak memory is the sum over processes of `VmHWM`, the kernel's own high-water mark of the resident
set, which is set back at the start of every measurement; no sampling, so no peak is missed. Pages
that several processes share (libraries, a forked parent's heap) count once per process there, and
once in all in `pss_bytes`, which is too slow to read while anything is measured.

Linux only. Nothing here needs more than the right to start the processes.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

Role = Literal["frontend", "engine"]

_ENGINE_TITLE = re.compile(r"\S+::(EngineCore|Worker|DPCoordinator)")
"""The titles that vLLM gives to processes which are not its frontend. Every other process of a
server is the frontend's: the parent, API servers, vllm-rs, resource trackers."""


def role_of(title: str) -> Role:
    """Tell the role of a server's process from its title, or its command line if it has none."""
    return "engine" if _ENGINE_TITLE.match(title) else "frontend"


def cpu_seconds(pid: int) -> float:
    """CPU time that the process has used so far: user and system, all threads, in seconds.

    Children count as processes of their own, ended ones too.

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        # The kernel's encoding of "the scheduler's clock of process `pid`" (posix-timers.h,
        # MAKE_PROCESS_CPUCLOCK); the C library's clock_getcpuclockid does the same.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        raise ProcessLookupError(f"no process {pid}") from None


def process_tree(root: int) -> dict[int, Role]:
    """Return the live processes that belong to `root`, with their roles.

    A process belongs if it descends from `root` or is in the session that `root` leads, so one
    whose parent has died is found too. Zombies are left out.
    """
    parents: dict[int, int] = {}
    found: set[int] = set()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        fields = _stat(int(name))
        if fields is None or fields[0] == "Z":
            continue
        parents[int(name)] = int(fields[1])
        if int(fields[3]) == root:
            found.add(int(name))
    if root in parents:
        found.add(root)
    grew = True
    while grew:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        found |= children
        grew = bool(children)
    return {pid: role_of(title(pid)) for pid in sorted(found)}


def title(pid: int) -> str:
    """Return the command line, or the title that the process gave itself; "" if it is gone."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode(errors="replace").strip()


def reset_peak_rss(pids: Iterable[int]) -> None:
    """Set the resident-set high-water mark of each process back to what it uses now."""
    for pid in pids:
        try:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        except OSError:
            continue  # gone, or another user's: its mark then covers its whole life


def peak_rss_bytes(pids: Iterable[int]) -> int:
    """Sum of the processes' resident-set high-water marks since `reset_peak_rss`."""
    return sum(_kilobytes(f"/proc/{pid}/status", "VmHWM:") for pid in pids) * 1024


def pss_bytes(pids: Iterable[int]) -> int:
    """Sum of the processes' resident memory now, each shared page shared out among its users.

    Walks the page tables (milliseconds for each GiB): never call it while measuring.
    """
    return sum(_kilobytes(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in pids) * 1024


def shared_memory_files(pids: Iterable[int]) -> set[Path]:
    """Return the files in /dev/shm that the processes map now."""
    files: set[Path] = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            start = line.find("/dev/shm/")
            if start >= 0 and not line.endswith("(deleted)"):
                files.add(Path(line[start:]))
    return files


def machine_busy_seconds() -> float:
    """CPU seconds that the machine has spent on anything since it started, to 10 ms.

    Good enough to tell whether somebody else is using the machine.
    """
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


class CpuMeter:
    """CPU seconds that a server's processes use between `start` and `stop`, by role.

    A process that appears in between counts in full. One that ends in between counts up to the
    last `poll`; servers do not normally lose processes while they are measured.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._before: dict[int, float] = {}
        self._latest: dict[int, float] = {}
        self._roles: dict[int, Role] = {}

    def start(self) -> None:
        """Begin the window."""
        self._roles = process_tree(self._root)
        self._before = self._read(self._roles)
        self._latest = dict(self._before)

    def poll(self) -> None:
        """Look at the processes once more, for the sake of those that come and go."""
        self._roles |= process_tree(self._root)
        self._latest |= self._read(self._roles)

    def stop(self) -> dict[Role, float]:
        """End the window and return CPU seconds by role.

        The clocks of the processes known so far are read first and the tree after, because walking
        /proc takes milliseconds in which a busy server goes on.
        """
        self._latest |= self._read(self._roles)
        tree = process_tree(self._root)
        self._latest |= self._read(tree.keys() - self._roles.keys())
        self._roles = tree | self._roles
        used: dict[Role, float] = {"frontend": 0.0, "engine": 0.0}
        for pid, seconds in self._latest.items():
            used[self._roles[pid]] += seconds - self._before.get(pid, 0.0)
        return used

    @staticmethod
    def _read(pids: Iterable[int]) -> dict[int, float]:
        clocks: dict[int, float] = {}
        for pid in pids:
            try:
                clocks[pid] = cpu_seconds(pid)
            except ProcessLookupError:
                continue
        return clocks


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on: state, parent, group, session, …"""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rsplit(")", 1)[1].split()


def _kilobytes(path: str, key: str) -> int:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)
