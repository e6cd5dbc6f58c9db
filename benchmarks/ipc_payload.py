"""Large messages between two processes: segments of shared memory against ZMQ, in MB per second.

    python -m scalellm_plugins.benchmarks.ipc_payload [--megabytes 1,64] [--rounds N]

One frame of so many megabytes (a tensor's bytes) is sent, and the other process reads one byte of
every page of it, then says so; the next is sent when it has. Both as the two are used between
vLLM's processes: ZMQ over `ipc://` with frames that are not copied, and `ipc.channel`, which copies
into memory beside the ring, out of which the reader copies at once, or, above 4 MB and in the way
"segments" always, into a segment that the reader maps. The ways take turns. CPU is both processes',
per message.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import select
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PAGE = 4096
WAYS = ("zmq", "channel", "segments")


def _touch(data: Any) -> int:
    return sum(bytes(memoryview(data).cast("B")[::_PAGE]))


def _reader(folder: str, commands: Any) -> None:
    import zmq

    from scalellm_plugins.ipc import peers
    from scalellm_plugins.ipc.channel import Channel, frames_of

    socket = zmq.Context().socket(zmq.PULL)
    socket.bind(f"ipc://{folder}/zmq")
    listener = peers.listen(folder, 0)
    commands.send("listening")
    eventfd = os.eventfd(0)
    select.select([listener], [], [])
    peer = peers.accept(listener, 0, 0)
    peers.welcome(peer, 0, eventfd)
    channel = Channel(peer)
    while (way := commands.recv()) is not None:
        begun = time.process_time()
        if way == "zmq":
            _touch(socket.recv(copy=False).buffer)
        else:
            while (message := channel.receive()) is None:
                if channel.consumer.park():
                    os.eventfd_read(eventfd)
                channel.consumer.unpark()
            frame: Any = frames_of(message)[0]
            _touch(bytes(frame) if message.borrowed else frame)
            del message, frame
            channel.release()
        commands.send(time.process_time() - begun)


def measure(megabytes: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return medians by way: MB per second, and ms of CPU per message."""
    import zmq

    from scalellm_plugins.ipc import peers
    from scalellm_plugins.ipc.channel import BESIDE_BYTES, Channel

    context = multiprocessing.get_context("spawn")
    data = os.urandom(_PAGE) * (megabytes * 1_000_000 // _PAGE)
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        end, commands = context.Pipe()
        reader = context.Process(target=_reader, args=(folder, commands), daemon=True)
        reader.start()
        end.recv()
        zmq_context = zmq.Context()
        socket = zmq_context.socket(zmq.PUSH)
        socket.connect(f"ipc://{folder}/zmq")
        peer = peers.connect(folder, 0, 0, os.eventfd(0), (1 << 20, 1 << 20))
        assert peer is not None
        channel = Channel(peer)
        for turn in range(rounds + 2):
            for way in WAYS:
                end.send(way)
                time.sleep(0.002)  # it waits
                started, begun = time.monotonic(), time.process_time()
                if way == "zmq":
                    socket.send(data, copy=False)
                else:
                    channel._most_beside = BESIDE_BYTES if way == "channel" else 0
                    channel.put(0, [data])
                theirs = end.recv()
                if turn > 1:
                    took = time.monotonic() - started
                    times[way].append((took, time.process_time() - begun + theirs))
        end.send(None)
        reader.join(10)
        zmq_context.destroy(0)
    found = {}
    for way, pairs in times.items():
        took = statistics.median(one for one, _ in pairs)
        cpu = statistics.median(one for _, one in pairs)
        found[way] = {
            "mb_per_s": round(len(data) / 1e6 / took),
            "ms": round(took * 1e3, 3),
            "cpu_ms": round(cpu * 1e3, 3),
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m scalellm_plugins.benchmarks.ipc_payload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--megabytes", default="1,64", help="sizes")
    parser.add_argument("--rounds", type=int, default=30, help="messages of each size and way")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args(argv)
    results = {}
    print("| MB | way | MB/s | ms | CPU ms, both sides |\n|---|---|---|---|---|")
    for size in map(int, options.megabytes.split(",")):
        results[size] = measure(size, options.rounds)
        for way, found in results[size].items():
            print(f"| {size} | {way} | {found['mb_per_s']:,} | {found['ms']} | {found['cpu_ms']} |")
    if options.output:
        command = f"ipc_payload --megabytes {options.megabytes} --rounds {options.rounds}"
        options.output.write_text(
            json.dumps({"command": command, "payloads": results}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
