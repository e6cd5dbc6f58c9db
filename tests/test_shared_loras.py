"""One table of adapters: every worker sees the last change, and ids are given out once."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.frontends.shared_loras import (
    LoraTable,
    SharedIds,
    SharedLoras,
    _once,
    _one_at_a_time,
)


class Lora(msgspec.Struct):
    """As much of vLLM's request for an adapter as the table looks at."""

    lora_name: str
    lora_int_id: int


NAME = st.sampled_from("abc")


@given(st.lists(st.tuples(st.integers(0, 2), NAME, st.none() | st.integers(1, 9)), max_size=30))
def test_every_view_is_the_last_change(steps: list[Any]) -> None:
    table, expected = LoraTable(), {}
    views = [SharedLoras(table, Lora) for _ in range(3)]
    for view, name, number in steps:
        if number is not None:
            views[view][name] = expected[name] = Lora(name, number)
        elif name in expected:
            del views[view][name]
            del expected[name]
        for each in views:
            assert list(each.values()) == list(expected.values())
            assert list(each) == list(expected)
            assert (name in each) == (name in expected)
            assert each.get(name) == expected.get(name)
            assert len(each) == len(expected)
            assert dict(each.items()) == expected


def test_a_change_that_was_not_finished_is_none() -> None:
    """A worker killed while it writes: readers have the table before, and the next write works."""
    table = LoraTable()
    table.write({"a": {"lora_name": "a", "lora_int_id": 1}})
    other = 64 + (1 << 23) * ((table.generation + 1) % 2)
    table._memory[other : other + 5] = b"\xff" * 5
    assert list(table.read()[1]) == ["a"]
    table.write({"b": {}})
    assert table.read()[1] == {"b": {}}


def test_too_many_adapters_say_so() -> None:
    with pytest.raises(MemoryError, match="unload some"):
        LoraTable().write({"a": {"lora_path": "x" * (1 << 23)}})


class Models:
    """As vLLM's: checks, then waits for the engine, then remembers."""

    def __init__(self, table: LoraTable) -> None:
        self.loras = SharedLoras(table, Lora)
        self.ids = SharedIds(table)
        self.load = _one_at_a_time(table, self._load)
        self.statics = 0
        self.init = _once(table, self.loras, self._init)

    async def _load(self, name: str) -> bool:
        if name in self.loras:
            return False
        number = self.ids.inc(1)
        await asyncio.sleep(0)
        self.loras[name] = Lora(name, number)
        return True

    async def _init(self) -> None:
        self.statics += 1
        assert await self.load("static")  # as vLLM does, by the method that takes the lock


def test_static_adapters_are_loaded_once() -> None:
    table = LoraTable()
    table.write({"half": {"lora_name": "half", "lora_int_id": 7}})  # by a worker that died
    first, second = Models(table), Models(table)

    async def start() -> None:
        await asyncio.gather(first.init(), second.init())

    asyncio.run(start())
    assert first.statics + second.statics == 1
    assert list(second.loras) == ["static"]


def test_of_two_that_load_the_same_name_one_does() -> None:
    table = LoraTable()
    models = Models(table)

    async def race() -> list[bool]:
        return list(await asyncio.gather(*(models.load("same") for _ in range(3))))

    assert sorted(asyncio.run(race())) == [False, False, True]


def test_the_lock_holds_between_processes_and_outlives_none() -> None:
    table = LoraTable()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover

        async def hold() -> None:
            async with table.locked():
                os.write(write, b"held")
                signal.pause()

        asyncio.run(hold())
    assert os.read(read, 4) == b"held"

    async def scenario() -> None:
        entered = asyncio.Event()

        async def enter() -> None:
            async with table.locked():
                entered.set()

        task = asyncio.create_task(enter())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(task), 0.1)
        assert not entered.is_set()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        await asyncio.wait_for(task, 60)
        assert entered.is_set()

    asyncio.run(scenario())
    os.close(read)
    os.close(write)
