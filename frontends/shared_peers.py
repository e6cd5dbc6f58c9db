"""Workers ask each other: one question, any number of answers, over a Unix socket per slot.

The sockets are made before the first worker is forked and have no name: a worker reaches another's
through a descriptor of it, which only processes of this server have. So what comes is trusted, and
is Python's own pickle. Whoever has no worker that listens is not asked.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import pickle
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

logger = logging.getLogger("vllm.scalellm")

_CONNECT_S = 2.0
_SIZE = 8
Handler = Callable[[Any], Awaitable[Any]]
"""Takes a question; returns the answer, or an asynchronous generator of answers."""


class Peers:
    """The sockets of all slots, and which of them are listened to."""

    def __init__(self, slots: int) -> None:
        self._listening = memoryview(mmap.mmap(-1, slots))
        self._sockets: list[socket.socket] = []
        self._ways: list[int] = []
        self._server: Any = None
        with tempfile.TemporaryDirectory(prefix="scalellm-") as folder:
            for slot in range(slots):
                path = f"{folder}/{slot}"
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                listener.bind(path)
                listener.listen(128)
                self._sockets.append(listener)
                self._ways.append(os.open(path, os.O_PATH | os.O_CLOEXEC))

    async def listen(self, slot: int, handler: Handler) -> None:
        """Answer what other workers ask the one in `slot`, which is this."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await _answer(handler, reader, writer)
            except (OSError, asyncio.IncompleteReadError):
                pass  # whoever asked has gone
            except Exception:
                logger.exception("a question of another API server could not be answered")
            finally:
                writer.close()

        # uvloop stops serving when nobody has the server.
        self._server = await asyncio.start_unix_server(serve, sock=self._sockets[slot].dup())
        self._listening[slot] = 1

    def clear(self, slot: int) -> None:
        """Nobody listens there: its worker is gone. By the supervisor."""
        self._listening[slot] = 0

    def others(self, slot: int) -> list[int]:
        """Return the slots besides `slot` whose workers listen."""
        return [n for n, listens in enumerate(self._listening) if listens and n != slot]

    async def ask(self, slot: int, question: Any) -> AsyncIterator[Any]:
        """Yield what the worker in `slot` answers; nothing if it is gone.

        Raises:
            Exception: what its handler raised.
        """
        try:
            async with asyncio.timeout(_CONNECT_S):
                way = f"/proc/self/fd/{self._ways[slot]}"
                reader, writer = await asyncio.open_unix_connection(way)
        except (OSError, TimeoutError):
            return
        try:
            _put(writer, question)
            while True:
                size = await reader.readexactly(_SIZE)
                kind, answer = pickle.loads(await reader.readexactly(int.from_bytes(size)))
                if kind == "error":
                    raise answer
                if kind == "end":
                    return
                yield answer
        except (OSError, asyncio.IncompleteReadError):
            return  # it died
        finally:
            writer.close()


def _put(writer: asyncio.StreamWriter, thing: Any) -> None:
    data = pickle.dumps(thing)
    writer.write(len(data).to_bytes(_SIZE) + data)


async def _answer(
    handler: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    size = await reader.readexactly(_SIZE)
    question = pickle.loads(await reader.readexactly(int.from_bytes(size)))
    # Ends when whoever asked goes away, whose end of file it is.
    work = asyncio.ensure_future(_work(handler, question, writer))
    gone = asyncio.ensure_future(reader.read(1))
    await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not work.done():
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        return
    work.result()


async def _work(handler: Handler, question: Any, writer: asyncio.StreamWriter) -> None:
    try:
        answer = await handler(question)
        if hasattr(answer, "__aiter__"):
            async for part in answer:
                _put(writer, ("answer", part))
                await writer.drain()
        else:
            _put(writer, ("answer", answer))
        _put(writer, ("end", None))
    except OSError:
        raise
    except Exception as error:
        _put(writer, ("error", error))
    await writer.drain()
