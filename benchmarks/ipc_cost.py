"""What a decode step costs between engine and API server: shared memory against vLLM's sockets.

    python -m scalellm_plugins.benchmarks.ipc_cost [--outputs 1,64,256,1024] [--rounds N]

Two processes. The engine side hands over `EngineCoreOutputs` at a steady pace, as vLLM's main loop
does after a step; the API server's side has an event loop (uvloop). No model and no HTTP.

- wake: nothing but a byte in a pipe and its reader's wake-up: what any way between two processes
  that sleep pays at least.
- vllm: vLLM's own code on both sides: `EngineCoreProc.process_output_sockets` in its thread (ZMQ,
  vLLM's encoder), `AsyncMPClient`'s task that reads, decodes and queues.
- ring: `engine/outbox.py` in the main loop, `frontends/merged_socket.py` in vLLM's task: objects
  for vLLM's own API server.
- columns: the same, read by `link.py`'s way: columns to the fast lane, no objects, no task.
- thread: as columns, but a thread of the engine's sorts, encodes and writes, not the main loop.
- lean: as columns, and the scheduler hands over columns, too (`scheduling/lean.py`).

On every way each output ends as a token beside whoever asked for it, looked up in the event loop.
CPU is each process's own clock, all threads, per step, less what the same pace costs with nothing
to send. Latency is from handing over to that lookup. The ways take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import platform
import queue
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WAYS = ("idle", "wake", "vllm", "ring", "columns", "thread", "lean")
_OURS = WAYS[3:]
_WARM = 50


def _outputs(number: int, step: int) -> list[Any]:
    from vllm.v1.engine import EngineCoreOutput

    return [
        EngineCoreOutput(f"chatcmpl-{index:016x}-{index:08x}", [(step * 7 + index) % 120_000])
        for index in range(number)
    ]


# The engine's side


def _behind(outbox: Any) -> Any:
    """A queue, and a thread that empties it into an outbox."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        while True:
            outbox.put_nowait(waiting.get())

    threading.Thread(target=run, daemon=True).start()
    return SimpleNamespace(put_nowait=waiting.put)


class _Engine:
    """Hands steps over; `addresses`: of the API server's output socket, one per way."""

    def __init__(self, addresses: dict[str, str], number: int) -> None:
        from vllm.v1.engine.core import EngineCoreProc
        from vllm.v1.serial_utils import MsgpackEncoder

        from scalellm_plugins.engine.outbox import Frontend, Outbox
        from scalellm_plugins.ipc import peers
        from scalellm_plugins.ipc.channel import Channel

        self.upstream: Any = EngineCoreProc.__new__(EngineCoreProc)
        self.upstream.output_queue = queue.Queue()
        threading.Thread(
            target=self.upstream.process_output_sockets,
            args=([addresses["vllm"]], None, 0),
            daemon=True,
        ).start()
        self.boxes: dict[str, Any] = {"vllm": self.upstream.output_queue, "wake": self}
        self._wakes = addresses["wake"]
        self._pipe = -1
        wake = os.eventfd(0)
        listeners = {way: peers.listen(addresses[way], 0) for way in _OURS}
        for way, listener in listeners.items():
            listener.setblocking(True)
            peer = peers.accept(listener, 0, 0)
            frontend = Frontend(Channel(peer), 0, MsgpackEncoder().encode)
            for slot in range(number):
                frontend.admit(f"chatcmpl-{slot:016x}-{slot:08x}", slot, True)
            outbox = Outbox(queue.Queue())
            outbox.connect(0, frontend)
            peers.welcome(peer, 0, wake)
            self.boxes[way] = outbox if way != "thread" else _behind(outbox)

    def put_nowait(self, item: Any) -> None:
        """For "wake": say when, and nothing else."""
        if self._pipe < 0:
            self._pipe = os.open(self._wakes, os.O_WRONLY)
        os.write(self._pipe, struct.pack("d", item[1].timestamp))

    def run(self, way: str, number: int, steps: int, pace: float) -> float:
        """Hand over steps; return CPU seconds, objects not counted."""
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

        from scalellm_plugins.engine.plain import PlainOutputs

        pool: list[Any] = [_outputs(number, step) for step in range(min(steps, 64))]
        if way == "lean":
            ids = [one.request_id for one in pool[0]]
            pool = [[one.new_token_ids[0] for one in step] for step in pool]
        box = self.boxes.get(way)
        gc.collect()
        begun = time.process_time()
        due = time.monotonic()
        for step in range(steps):
            due += pace
            if (left := due - time.monotonic()) > 0:
                time.sleep(left)
            # A copy: whoever takes columns out of it changes the list. The lean step hands over the
            # same list of ids as long as the batch is the same.
            made: Any = list(pool[step % len(pool)])
            if way == "lean":
                made = PlainOutputs(ids, made, [], EngineCoreOutput)
            outputs = EngineCoreOutputs(outputs=made)
            if box is not None:
                box.put_nowait((0, outputs))
        time.sleep(0.05)
        return time.process_time() - begun


def _engine(addresses: dict[str, str], number: int, commands: Any) -> None:
    engine = _Engine(addresses, number)
    while (command := commands.recv()) is not None:
        commands.send(engine.run(*command))


# The API server's side


class _Columns:
    """A sink that does with columns what the lane does, short of detokenizing."""

    def __init__(self, latencies: list[float]) -> None:
        self.latencies = latencies
        self.tokens = 0

    def on_step(self, step: Any, general: Any, rings: Any) -> None:  # noqa: ARG002
        """Look every request up."""
        for receiver, _token in zip(step.receivers, step.tokens, strict=True):
            if receiver is not None:
                self.tokens += 1
        self.latencies.append(time.monotonic() - step.timestamp)

    def on_outputs(self, outputs: Any) -> None:
        """None come."""

    def on_end(self) -> None:
        """Nothing to write."""

    def on_dead(self, error: Exception) -> None:
        """The end of the benchmark."""


def _client(address: str) -> Any:
    """A client of the engine as far as reading goes: vLLM's own methods over its own sockets."""
    import zmq
    import zmq.asyncio
    from vllm.utils.network_utils import make_zmq_socket
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.core_client import AsyncMPClient
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    client: Any = AsyncMPClient.__new__(AsyncMPClient)
    context = zmq.asyncio.Context()
    socket = make_zmq_socket(context, address, zmq.PULL)
    client.resources = SimpleNamespace(
        output_queue_task=None,
        output_socket=socket,
        validate_alive=lambda _: None,
        engine_dead=False,
        context=context,
    )
    client.encoder, client.decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
    client.utility_results = {}
    client.outputs_queue = asyncio.Queue()
    client.core_engines = [b"\0\0"]
    client.client_index = 0
    client._finalizer = SimpleNamespace(alive=False)
    client.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace())
    return client


async def _serve(addresses: dict[str, str], number: int, commands: Any) -> None:
    from vllm.v1.engine.core_client import AsyncMPClient

    from scalellm_plugins.frontends.engine_rings import EngineRings
    from scalellm_plugins.frontends.merged_socket import MergedDecoder, MergedSocket

    loop = asyncio.get_running_loop()
    latencies: dict[str, list[float]] = {way: [] for way in WAYS}

    states = {f"chatcmpl-{slot:016x}-{slot:08x}": slot for slot in range(number)}

    async def read(way: str, client: Any) -> None:
        tokens = 0
        while True:
            outputs = await AsyncMPClient.get_output_async(client)
            # As vLLM's `OutputProcessor.process_outputs` begins with each.
            for output in outputs.outputs:
                if states.get(output.request_id) is not None:
                    tokens += 1
            latencies[way].append(time.monotonic() - outputs.timestamp)

    pipe = os.open(addresses["wake"], os.O_RDONLY | os.O_NONBLOCK)

    def on_wake() -> None:
        (timestamp,) = struct.unpack("d", os.read(pipe, 8))
        latencies["wake"].append(time.monotonic() - timestamp)

    loop.add_reader(pipe, on_wake)
    tasks, rings_of = [], []
    for way in ("vllm", *_OURS):
        client = _client(addresses[way])
        if way != "vllm":
            rings: Any = EngineRings.connect(client)
            for slot in range(number):
                rings.requests[slot] = f"chatcmpl-{slot:016x}-{slot:08x}"
            rings_of.append(rings)
        if way in ("columns", "thread", "lean"):
            rings.start(_Columns(latencies[way]))
            continue
        if way == "ring":
            merged = MergedSocket(client.resources.output_socket, rings)
            client.resources.output_socket = merged
            client.decoder = MergedDecoder(client.decoder)
        AsyncMPClient._ensure_output_queue_task(client)
        if way == "ring":
            merged.start(client.resources.output_queue_task)
        tasks.append(loop.create_task(read(way, client)))
    commands.send("ready")
    begun: list[float] = []

    def on_command() -> None:
        command = commands.recv()
        if command is None:
            loop.stop()
        elif command == "begin":
            gc.collect()
            begun.append(time.process_time())
            for seen in latencies.values():
                seen.clear()
        else:
            commands.send((time.process_time() - begun.pop(), latencies[command]))

    loop.add_reader(commands.fileno(), on_command)
    await asyncio.Event().wait()


def _frontend(addresses: dict[str, str], number: int, commands: Any) -> None:
    import uvloop

    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    with contextlib.suppress(RuntimeError):  # stopped
        loop.run_until_complete(_serve(addresses, number, commands))


# The measurement


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1e6


def measure(number: int, rounds: int, steps: int, pace: float) -> dict[str, dict[str, float]]:
    """Return figures by way, in µs; the median of all rounds, latencies of all together."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        addresses = {way: f"ipc://{folder}/{way}" for way in WAYS}
        addresses["wake"] = f"{folder}/wake"
        os.mkfifo(addresses["wake"])
        engine_end, engine_commands = context.Pipe()
        frontend_end, frontend_commands = context.Pipe()
        engine = context.Process(target=_engine, args=(addresses, number, engine_commands))
        engine.start()
        time.sleep(0.1)
        frontend = context.Process(
            target=_start_frontend, args=(addresses, number, frontend_commands)
        )
        frontend.start()
        frontend_end.recv()
        cpu: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        waits: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(rounds + 1):
            for way in WAYS:
                frontend_end.send("begin")
                engine_end.send((way, number, steps if turn else _WARM, pace))
                engine_cpu = engine_end.recv()
                frontend_end.send(way)
                frontend_cpu, latencies = frontend_end.recv()
                if turn:
                    cpu[way].append((engine_cpu / steps * 1e6, frontend_cpu / steps * 1e6))
                    waits[way] += latencies
                    assert way == "idle" or len(latencies) == steps, (way, len(latencies))
        for end in (engine_end, frontend_end):
            end.send(None)
        for process in (engine, frontend):
            process.join(10)
    # Short rounds, and medians of them: the machine's own pace changes from second to second.
    base = [statistics.median(pair[side] for pair in cpu["idle"]) for side in (0, 1)]
    found = {}
    for way in WAYS[1:]:
        sides = [statistics.median(p[side] for p in cpu[way]) - base[side] for side in (0, 1)]
        found[way] = {
            "engine_us": round(sides[0], 1),
            "frontend_us": round(sides[1], 1),
            "both_us": round(sum(sides), 1),
            "latency_p50_us": round(_quantile(waits[way], 0.5), 1),
            "latency_p99_us": round(_quantile(waits[way], 0.99), 1),
        }
    return found


def _start_frontend(addresses: dict[str, str], number: int, commands: Any) -> None:
    """Wait until the engine listens, then be the API server."""
    from scalellm_plugins.ipc import peers

    listening = peers.name_of(addresses["columns"], 0).decode("latin-1")[1:]
    deadline = time.monotonic() + 120
    while listening not in Path("/proc/net/unix").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    _frontend(addresses, number, commands)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m scalellm_plugins.benchmarks.ipc_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--outputs", default="1,64,256,1024", help="outputs of a step")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100, help="steps a round")
    parser.add_argument("--pace", type=float, default=5.0, help="ms from step to step")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args(argv)
    sizes = [int(size) for size in options.outputs.split(",")]
    found: dict[str, Any] = {}
    print(
        f"{'outputs':>8} {'way':8} {'engine':>8} {'frontend':>9} {'both':>8} {'ratio':>6}"
        f" {'p50':>8} {'p99':>8}   (µs of CPU per step; latency in µs)"
    )
    for size in sizes:
        ways = found[str(size)] = measure(size, options.rounds, options.steps, options.pace / 1e3)
        for way, one in ways.items():
            ratio = one["both_us"] / ways["vllm"]["both_us"]
            print(
                f"{size:8} {way:8} {one['engine_us']:8.1f} {one['frontend_us']:9.1f}"
                f" {one['both_us']:8.1f} {ratio:6.2f} {one['latency_p50_us']:8.1f}"
                f" {one['latency_p99_us']:8.1f}",
                flush=True,
            )
    if options.output:
        about = {
            "command": f"ipc_cost --outputs {options.outputs} --rounds {options.rounds} "
            f"--steps {options.steps} --pace {options.pace}",
            "cpu": platform.processor(),
            "steps": found,
        }
        options.output.write_text(json.dumps(about, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
