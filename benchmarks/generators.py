"""The load generators, each mapped to the same result.

`own` (`load.py`) is the default: it streams or not, leads conversations, measures a window in
which all streams are busy and checks every answer. `vllm-rs` (`vllm-rs bench serve`) and `vllm`
(`vllm bench serve`) are there to check ours against; they know only streamed, single-turn requests
and measure from the first request to the last answer, ramp and tail included. `vllm` is Python
with a task per request and a JSON parse per token: it can be slower than what it measures.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalellm_plugins.errors import ScaleLLMError

from . import procstat
from .load import Spec
from .server import Server, die_with_parent
from .systems import SERVED_NAME, vllm_executable
from .workloads import Template, Workload

Result = dict[str, Any]
"""As `load.py` prints it: window_s, output_tokens, failed, client_cpu_s, ttft_p50_ms, …"""


class LoadError(ScaleLLMError):
    """The load generator ended without a result."""


@dataclass(frozen=True)
class Cell:
    """One load: what is asked, how, and by how many streams."""

    workload: Workload
    stream: bool
    streams: int

    def __str__(self) -> str:
        mode = "stream" if self.stream else "nonstream"
        return f"{self.workload.name} {mode} ×{self.streams}"


@dataclass(frozen=True)
class Setting:
    """What the runs have in common. `words` is the file that `Spec.words` names."""

    window_s: float
    scratch: Path
    model_dir: Path
    words: Path
    template: Template
    timeout_s: float = 300.0


class Generator(ABC):
    """Makes load on a server, and says when the window that counts begins and ends."""

    name: str

    def refusal(self, cell: Cell) -> str:
        """Say what this generator lacks for such a load; "" if it can make it."""
        if not cell.stream:
            return "always streams"
        return "leads no conversations" if cell.workload.turns > 1 else ""

    @abstractmethod
    def run(
        self,
        server: Server,
        cell: Cell,
        setting: Setting,
        seed: int,
        begin: Callable[[], None],
        end: Callable[[], None],
    ) -> Result:
        """Run one cell; `begin` and `end` are called at the edges of the window.

        Raises:
            LoadError: no result.
        """


class OwnGenerator(Generator):
    """`load.py`, in a process of its own."""

    name = "own"

    def refusal(self, cell: Cell) -> str:  # noqa: ARG002 - it can make every load
        """See `Generator.refusal`."""
        return ""

    def run(
        self,
        server: Server,
        cell: Cell,
        setting: Setting,
        seed: int,
        begin: Callable[[], None],
        end: Callable[[], None],
    ) -> Result:
        """See `Generator.run`."""
        spec = Spec(
            host=server.host,
            port=server.port,
            model=SERVED_NAME,
            workload=cell.workload,
            template=setting.template,
            stream=cell.stream,
            streams=cell.streams,
            window_s=setting.window_s,
            words=str(setting.words),
            seed=seed,
            timeout_s=setting.timeout_s,
        )
        path = setting.scratch / "load.json"
        path.write_text(spec.to_json())
        argv = [sys.executable, "-m", "scalellm_plugins.benchmarks.load", str(path)]
        edges = {"begin": begin, "end": end}
        lines = _follow(argv, setting.scratch / "load.log", edges)
        result: Result = json.loads(lines[-1])
        return result


class BenchServe(Generator):
    """`vllm bench serve` or `vllm-rs bench serve`, which share their options and results."""

    def __init__(self, name: str, argv: list[str], edges: tuple[str, str]) -> None:
        self.name = name
        self._argv = argv
        self._edges = edges

    def run(
        self,
        server: Server,
        cell: Cell,
        setting: Setting,
        seed: int,
        begin: Callable[[], None],
        end: Callable[[], None],
    ) -> Result:
        """See `Generator.run`."""
        output = setting.scratch / "bench-serve.json"
        output.unlink(missing_ok=True)
        argv = [*self._argv, *self._options(server, cell, setting, seed, output)]
        clock = _ClientClock(begin, end)
        edges = {self._edges[0]: clock.begin, self._edges[1]: clock.end}
        _follow(argv, setting.scratch / f"{self.name}-bench.log", edges, clock.attach)
        if not output.exists():
            raise LoadError(f"{self.name} bench serve left no result")
        return _mapped(json.loads(output.read_text()), clock.seconds)

    def _options(
        self, server: Server, cell: Cell, setting: Setting, seed: int, output: Path
    ) -> list[str]:
        # The length is a number of requests, the same for all systems. One of each stream, a wave,
        # takes in the order of a second with short prompts, and far longer with long ones.
        waves = max(2, round(setting.window_s)) if cell.workload.prompt < 1000 else 2
        options = {
            "--backend": "openai-chat",
            "--endpoint": "/v1/chat/completions",
            "--host": server.host,
            "--port": server.port,
            "--model": SERVED_NAME,
            "--tokenizer": setting.model_dir,
            "--dataset-name": "random",
            "--random-input-len": cell.workload.prompt - setting.template.base,
            "--random-output-len": cell.workload.output,
            "--num-prompts": cell.streams * waves,
            "--max-concurrency": cell.streams,
            "--seed": seed % 2**31,
            "--percentile-metrics": "ttft,tpot,itl,e2el",
            "--metric-percentiles": "50,99",
            "--result-dir": output.parent,
            "--result-filename": output.name,
        }
        words = [str(word) for pair in options.items() for word in pair]
        return [*words, "--ignore-eos", "--save-result", "--disable-tqdm"]


class _ClientClock:
    """CPU seconds of another load generator's process between the edges of its window."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end
        self._pid = 0
        self.seconds = 0.0

    def attach(self, pid: int) -> None:
        self._pid = pid

    def begin(self) -> None:
        self._begin()
        self.seconds = -procstat.cpu_seconds(self._pid)

    def end(self) -> None:
        self.seconds += procstat.cpu_seconds(self._pid)
        self._end()


def generator_named(name: str, vllm_rs: Path | None) -> Generator:
    """Return the load generator called `name`: own, vllm or vllm-rs."""
    if name == "own":
        return OwnGenerator()
    if name == "vllm":
        argv = [vllm_executable(), "bench", "serve"]
        return BenchServe(name, argv, ("Starting main benchmark run", "Serving Benchmark Result"))
    argv = [str(vllm_rs), "bench", "serve"]
    return BenchServe(name, argv, ("starting main benchmark run", "Serving Benchmark Result"))


def _follow(
    argv: list[str],
    log: Path,
    edges: dict[str, Callable[[], None]],
    started: Callable[[int], None] | None = None,
) -> list[str]:
    """Run a load generator, call `edges` when their text comes by, and return its lines."""
    lines: list[str] = []
    waiting = dict(edges)
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent(signal.SIGKILL),
        start_new_session=True,
    )
    try:
        if started:
            started(process.pid)
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            for text in [text for text in waiting if text in line]:
                waiting.pop(text)()
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    log.write_text("\n".join(lines))
    if code or waiting:
        tail = "\n".join(f"    {line}" for line in lines[-15:])
        raise LoadError(f"the load generator ended without a result (status {code}):\n{tail}")
    return lines


def _mapped(raw: dict[str, Any], client_cpu_s: float) -> Result:
    """Turn the result of a `bench serve` into ours."""
    failed = raw.get("failed", 0)
    result: Result = {
        "window_s": raw["duration"],
        "output_tokens": raw["total_output_tokens"],
        "requests": raw["completed"],
        "failed": failed,
        "failures": {"reported by the load generator": failed} if failed else {},
        "client_cpu_s": client_cpu_s,
        "tokens_per_event": None,
        "prompt_tokens": raw["total_input_tokens"] / max(raw["completed"], 1),
        "wrong_prompts": 0,
    }
    for ours, theirs in (("ttft", "ttft"), ("itl", "itl"), ("tpot", "tpot"), ("e2e", "e2el")):
        for share in (50, 99):
            result[f"{ours}_p{share}_ms"] = raw.get(f"p{share}_{theirs}_ms")
    return result
