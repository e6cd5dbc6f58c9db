"""Workers that ask each other, here in one process, on the event loop that they have."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest

uvloop = pytest.importorskip("uvloop")

from scalellm_plugins.frontends.shared_peers import Peers  # noqa: E402


async def everything(peers: Peers, slot: int, question: Any) -> list[Any]:
    return [answer async for answer in peers.ask(slot, question)]


def test_one_answer_many_answers_and_errors() -> None:
    async def handler(question: Any) -> Any:
        if question == "many":

            async def parts() -> AsyncIterator[int]:
                for part in range(3):
                    yield part

            return parts()
        if question == "bad":
            raise ValueError("no such thing")
        return question * 100_000  # more than a buffer holds

    async def scenario() -> None:
        peers = Peers(3)
        await peers.listen(1, handler)
        gc.collect()  # which must not find the server
        assert peers.others(0) == [1]
        assert peers.others(1) == []
        assert await everything(peers, 1, "many") == [0, 1, 2]
        assert await everything(peers, 1, "x") == ["x" * 100_000]
        with pytest.raises(ValueError, match="no such thing"):
            await everything(peers, 1, "bad")
        peers.clear(1)
        assert peers.others(0) == []

    uvloop.run(scenario())


def test_who_stops_listening_to_answers_ends_them() -> None:
    """A client that leaves a stream must not leave a task behind in the other worker."""

    async def scenario() -> None:
        ended = asyncio.Event()

        async def endless() -> AsyncIterator[int]:
            try:
                yield 0
                await asyncio.Event().wait()
            finally:
                ended.set()

        async def handler(_: Any) -> Any:
            return endless()

        peers = Peers(1)
        await peers.listen(0, handler)
        answers = peers.ask(0, "go on")
        assert await anext(answers) == 0
        await answers.aclose()
        await asyncio.wait_for(ended.wait(), 60)

    uvloop.run(scenario())


def test_an_owner_that_dies_ends_the_answers() -> None:
    async def scenario() -> None:
        writers = []

        async def die(_: Any, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            writer.transport.abort()

        peers = Peers(1)
        server = await asyncio.start_unix_server(die, sock=peers._sockets[0].dup())
        assert await everything(peers, 0, "still there?") == []
        assert writers
        server.close()

    uvloop.run(scenario())
