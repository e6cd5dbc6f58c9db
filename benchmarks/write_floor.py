"""The floor of streaming: writing one event per stream and step, and nothing else.

    python -m scalellm_plugins.benchmarks.write_floor [--streams N] [--steps N]

A process with N connections writes 230 bytes to each, once per step of 4 ms, over the loopback to
another process that reads them; CPU time of the writer, the kernel's part included. By uvloop's
transport, as every server on uvloop does, and straight to the socket, as the fast lane does.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import selectors
import socket
import time
from collections.abc import Sequence
from typing import Any

_EVENT = b"x" * 230


def _read(port: int, streams: int) -> None:
    """Read from every connection until all are closed."""
    selector = selectors.DefaultSelector()
    for _ in range(streams):
        selector.register(socket.create_connection(("127.0.0.1", port)), selectors.EVENT_READ)
    while selector.get_map():
        for key, _events in selector.select():
            connection: Any = key.fileobj
            if not connection.recv(65536):
                selector.unregister(connection)
                connection.close()


async def _measure(way: str, streams: int, steps: int) -> float:
    """Return µs of CPU per event."""
    connections: list[Any] = []

    class Sink(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            connections.append(transport)

    server = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reader = multiprocessing.get_context("spawn").Process(target=_read, args=(port, streams))
    reader.start()
    while len(connections) < streams:
        await asyncio.sleep(0.01)  # another process connects: there is nothing to wait on
    descriptors = [one.get_extra_info("socket").fileno() for one in connections]
    spent = 0.0
    for _ in range(steps):
        await asyncio.sleep(0.004)
        clock = time.thread_time()
        if way == "transport":
            for connection in connections:
                connection.write(_EVENT)
            await asyncio.sleep(0)  # uvloop writes at the end of the turn
            await asyncio.sleep(0)
        else:
            for descriptor in descriptors:
                os.write(descriptor, _EVENT)
        spent += time.thread_time() - clock
    for connection in connections:
        connection.close()
    server.close()
    await asyncio.to_thread(reader.join)
    return spent / steps / streams * 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    import uvloop

    parser = argparse.ArgumentParser(
        prog="python -m scalellm_plugins.benchmarks.write_floor", description=__doc__
    )
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    for _ in range(options.rounds):
        for way in ("transport", "socket"):
            spent = uvloop.run(_measure(way, options.streams, options.steps))
            print(f"{way:10} {spent:6.2f} µs per event")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
