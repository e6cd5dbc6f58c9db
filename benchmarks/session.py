"""A comparison as it runs: servers up, cells measured in turn, everything down again.

All servers are up at the same time and take turns, cell by cell: what drifts on the machine (its
clock, its neighbours) then falls on all systems alike, where one server after another would put
half an hour between two numbers that are compared. It also starts each server once instead of once
a round (20 s each). The price is memory, 1-2 GB a server, and what an idle server uses: its engine
blocks, its API servers wait; the CPU they do use is measured in every cell (`idle_cores`), as is
what anybody else on the machine used (`other_cores`).
"""

from __future__ import annotations

import http.client
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalellm_plugins.errors import ScaleLLMError

from . import procstat
from .generators import Cell, Generator, LoadError, Setting
from .report import Sample
from .server import Server, ServerError, stop_all
from .systems import SERVED_NAME, System, Target
from .workloads import Template, Texts, message

_BUSY_NEIGHBOURS = 0.15  # cores used by others above which a measurement is not to be trusted


def say(text: str) -> None:
    """Tell the user what is going on; the table alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Session:
    """The servers of one comparison, and what has been measured on them. Use it in a `with`."""

    systems: Sequence[System]
    target: Target
    logs: Path
    start_timeout_s: float
    servers: dict[str, Server] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    _pids: dict[str, list[int]] = field(default_factory=dict)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self.servers:
            say("stopping the servers …")
        for note in stop_all(list(self.servers.values())):
            say(f"  {note}")

    def start(self) -> None:
        """Start all servers, one after the other; what does not start goes to `broken`."""
        for number, system in enumerate(self.systems, 1):
            label = f"starting {number}/{len(self.systems)} {system.name}"
            server = Server(system, self.target, self.logs)
            say(f"{label}: {' '.join(server.command[1:])}")
            started = time.monotonic()
            self.servers[system.name] = server
            try:
                server.start()
                server.wait_ready(self.start_timeout_s, _ticker(label))
            except (ServerError, OSError) as error:
                self._break(system.name, str(error))
                server.stop()
                continue
            self._pids[system.name] = server.processes()
            say(f"  ready after {time.monotonic() - started:.0f} s")

    def template(self, words: Sequence[str]) -> Template:
        """Ask the servers how many tokens the chat template adds.

        A server that does not answer goes to `broken`; one that disagrees is told to the user.

        Raises:
            ScaleLLMError: no server answers.
        """
        found: Template | None = None
        for name in [name for name in self.servers if name not in self.broken]:
            try:
                template = template_of(self.servers[name], words)
            except (OSError, http.client.HTTPException, ValueError, ServerError) as error:
                self._break(name, f"{name} does not answer a chat request: {error}")
                continue
            if found and template != found:
                say(f"  {name} applies another chat template: {template}, not {found}")
            found = found or template
        if found is None:
            raise ScaleLLMError("no system is left to measure")
        return found

    def measure(
        self, name: str, cell: Cell, generator: Generator, setting: Setting, seed: int
    ) -> Sample:
        """Measure one cell on one system and keep the sample, which holds no values if it fails."""
        sample: Sample = {
            "system": name,
            "workload": cell.workload.name,
            "stream": cell.stream,
            "streams": cell.streams,
            "failed": 0,
        }
        try:
            sample |= self._measure(name, cell, generator, setting, seed)
        except (LoadError, ServerError) as error:
            # Every stream's request counts as failed.
            sample |= {"failed": cell.streams, "error": str(error)}
        self.samples.append(sample)
        return sample

    def _measure(
        self, name: str, cell: Cell, generator: Generator, setting: Setting, seed: int
    ) -> dict[str, Any]:
        self._check(name)
        server = self.servers[name]
        idle = [pid for other, pids in self._pids.items() if other != name for pid in pids]
        gauge = _Gauge(server, idle)
        result = generator.run(server, cell, setting, seed, gauge.begin, gauge.end)
        self._check(name)
        return result | gauge.read(result)

    def _check(self, name: str) -> None:
        """Raise ServerError if the server is not there any more, or never was."""
        server = self.servers[name]
        if name not in self.broken and not server.alive():
            self._break(name, f"{name} has ended.\n{server.log_tail()}")
        if name in self.broken:
            raise ServerError(self.broken[name])

    def _break(self, name: str, reason: str) -> None:
        self.broken[name] = reason
        self._pids.pop(name, None)
        say(f"FAILED {reason}")


class _Gauge:
    """What is read from the operating system around one window."""

    def __init__(self, server: Server, idle: Sequence[int]) -> None:
        self._meter = procstat.CpuMeter(server.pid)
        self._processes = server.processes()
        self._idle = idle
        self._used: dict[procstat.Role, float] = {}
        self._busy = self._idle_s = self._self_s = self._began = 0.0
        self._seconds = 1.0
        self._rss = 0
        procstat.reset_peak_rss(self._processes)

    def begin(self) -> None:
        """The window opens."""
        self._meter.start()
        self._began = time.monotonic()
        self._busy = procstat.machine_busy_seconds()
        self._idle_s = _cpu(self._idle)
        self._self_s = _self_cpu()

    def end(self) -> None:
        """The window closes."""
        self._used = self._meter.stop()
        self._seconds = time.monotonic() - self._began
        self._busy = procstat.machine_busy_seconds() - self._busy
        self._idle_s = _cpu(self._idle) - self._idle_s
        self._self_s = _self_cpu() - self._self_s
        self._rss = procstat.peak_rss_bytes(self._processes)

    def read(self, result: dict[str, Any]) -> dict[str, Any]:
        """Return the sample's fields, for what the load generator counted in the window."""
        tokens = result["output_tokens"]
        used: dict[str, float] = {"client": result["client_cpu_s"]}
        used |= {str(role): seconds for role, seconds in self._used.items()}
        ours = sum(used.values()) + self._idle_s + self._self_s
        return {
            "output_tok_s": tokens / result["window_s"],
            "cpu_us_per_token": {
                role: seconds * 1e6 / tokens if tokens else None for role, seconds in used.items()
            },
            "rss_peak_mb": self._rss / 1e6,
            "pss_mb": procstat.pss_bytes(self._processes) / 1e6,
            "idle_cores": self._idle_s / self._seconds,
            "other_cores": max(0.0, self._busy - ours) / self._seconds,
        }


def _cpu(pids: Sequence[int]) -> float:
    total = 0.0
    for pid in pids:
        try:
            total += procstat.cpu_seconds(pid)
        except ProcessLookupError:
            continue
    return total


def _self_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def template_of(server: Server, words: Sequence[str]) -> Template:
    """Ask a server how many tokens its chat template adds to a message and to a system message.

    Raises:
        ServerError: it refuses, or texts of different lengths show different additions, so that
            prompts of an exact length cannot be made.
    """
    texts = Texts(words, seed=0)
    short, long = (_prompt_tokens(server, message("user", texts.text(n))) - n for n in (8, 100))
    if short != long:
        raise ServerError(f"its chat template adds {short} tokens to one text, {long} to another")
    both = message("system", texts.fixed(20)) + b"," + message("user", texts.text(8))
    return Template(short, _prompt_tokens(server, both) - short - 28)


def _prompt_tokens(server: Server, messages: bytes) -> int:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    body = b'{"model":"%b","max_tokens":1,"messages":[%b]}' % (SERVED_NAME.encode(), messages)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise ServerError(f"HTTP {answer.status}: {text[:300].decode(errors='replace')}")
    return int(json.loads(text)["usage"]["prompt_tokens"])


def _ticker(label: str) -> Callable[[float], None]:
    """Show on a terminal, and only there, how long something has taken."""

    def tick(seconds: float) -> None:
        if sys.stderr.isatty():
            print(f"\r{label} … {seconds:3.0f} s ", end="\r", file=sys.stderr, flush=True)

    return tick


def turns(
    systems: Sequence[System], cells: Sequence[Cell], rounds: int
) -> Iterator[tuple[int, Cell, str]]:
    """Yield (round, cell, system) in the order of measurement.

    Every round starts with another system, so that none always follows the same neighbour.
    """
    names = [system.name for system in systems]
    for number in range(rounds):
        shift = number % len(names)
        for cell in cells:
            for name in names[shift:] + names[:shift]:
                yield number, cell, name


def outcome(sample: Sample) -> str:
    """Say in a few words what was measured."""
    if sample.get("error"):
        return f"FAILED: {sample['error'].splitlines()[0]}"
    cpu = sample["cpu_us_per_token"]
    if not sample["output_tok_s"]:
        return f"FAILED: no output tokens; {_reasons(sample)}"
    text = f"{sample['output_tok_s']:,.0f} tok/s"
    if sample.get("ideal_fraction") is not None:
        text += f" ({sample['ideal_fraction']:.1%} of ideal)"
    text += f", CPU {cpu['frontend']:.1f} + {cpu['engine']:.1f} µs/token"
    if sample["failed"]:
        text += f", {sample['failed']} failed ({_reasons(sample)})"
    if sample["wrong_prompts"]:
        text += f", {sample['wrong_prompts']} prompts of another length than meant"
    if sample["other_cores"] > _BUSY_NEIGHBOURS:
        text += f" [others used {sample['other_cores']:.2f} cores]"
    return text


def _reasons(sample: Sample) -> str:
    return "; ".join(f"{count} × {reason}" for reason, count in sample["failures"].items())
