"""LoRA adapters that are loaded and unloaded while the server runs, the same in every worker.

vLLM's `OpenAIServingModels.lora_requests` becomes a view of one table that all workers share: each
look at it first compares a generation number, so an adapter is there for every worker, and for
those that start later, when the request that loaded it is answered. Nobody is told and nobody has
to acknowledge. Ids come from the table, too: they name adapters in the engine.

Layout of the file in memory: words (int64) 0 generation, 1 last id, 2 whether the static adapters
are loaded, 3 and 4 the lengths of two halves; then the halves, msgpack. A change goes into the half
that is not in use, and is there when the generation says so: a worker may die at any instruction.
Changes are made under a lock that the kernel takes back from a worker that dies; readers take none.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

_HALF = 1 << 23
"""Room for adapters by the ten thousand. Memory is only used for what is there."""

_GENERATION, _LAST_ID, _STATICS, _LENGTHS = range(4)
_HEADER = 64
_POLL_S = 0.01

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(dict[str, dict[str, Any]]).decode


class LoraTable:
    """Name → fields of the adapter, over all workers."""

    def __init__(self) -> None:
        self._file = os.memfd_create("scalellm_loras", os.MFD_CLOEXEC)
        os.ftruncate(self._file, _HEADER + 2 * _HALF)
        self._memory = mmap.mmap(self._file, _HEADER + 2 * _HALF)
        self._words = memoryview(self._memory)[:_HEADER].cast("q")
        self._here: asyncio.Lock | None = None
        self._holder: Any = None

    @property
    def generation(self) -> int:
        """A number that changes with the table."""
        return self._words[_GENERATION]

    @property
    def statics_loaded(self) -> bool:
        """Whether the adapters of the command line are loaded. Set under the lock."""
        return bool(self._words[_STATICS])

    @statics_loaded.setter
    def statics_loaded(self, value: bool) -> None:
        self._words[_STATICS] = value

    def read(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """Return generation and adapters."""
        while True:
            generation = self._words[_GENERATION]
            half = generation % 2
            start = _HEADER + half * _HALF
            data = self._memory[start : start + self._words[_LENGTHS + half]]
            if generation == self._words[_GENERATION]:
                return generation, _decode(data) if data else {}

    def write(self, adapters: dict[str, dict[str, Any]]) -> int:
        """Replace the table; return its generation. Under the lock.

        Raises:
            MemoryError: there are too many adapters.
        """
        data = _encode(adapters)
        if len(data) > _HALF:
            raise MemoryError(
                f"{len(adapters)} LoRA adapters need {len(data)} bytes of the {_HALF} that a "
                "server's workers share: unload some with /v1/unload_lora_adapter"
            )
        generation = self._words[_GENERATION] + 1
        half = generation % 2
        start = _HEADER + half * _HALF
        self._memory[start : start + len(data)] = data
        self._words[_LENGTHS + half] = len(data)
        self._words[_GENERATION] = generation  # from here on it is this half
        return generation

    def next_id(self) -> int:
        """Return an id that no adapter has had. Under the lock."""
        self._words[_LAST_ID] += 1
        return self._words[_LAST_ID]

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Hold the lock; waits for other tasks and other workers, not for the own task."""
        task = asyncio.current_task()
        if self._holder is task:
            yield
            return
        if self._here is None:
            self._here = asyncio.Lock()  # made here: it belongs to the worker's event loop
        async with self._here:
            await self._lock_file()
            self._holder = task
            try:
                yield
            finally:
                self._holder = None
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    async def _lock_file(self) -> None:
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except (BlockingIOError, PermissionError):
                # A load takes as long as the disk does: the loop must go on meanwhile, and nothing
                # wakes it when another process lets go.
                await asyncio.sleep(_POLL_S)


class SharedLoras(dict[str, Any]):
    """vLLM's `lora_requests` (name → `LoRARequest`), as the table has it at every look.

    `make` builds a request from its fields. Changed only under the table's lock.
    """

    def __init__(self, table: LoraTable, make: Callable[..., Any]) -> None:
        super().__init__()
        self._table = table
        self._make = make
        self._seen = -1

    def _sync(self) -> None:
        if self._seen == self._table.generation:
            return
        self._seen, adapters = self._table.read()
        super().clear()
        super().update({name: self._make(**fields) for name, fields in adapters.items()})

    def _publish(self) -> None:
        adapters = {
            name: {field: getattr(lora, field) for field in lora.__struct_fields__}
            for name, lora in super().items()
        }
        self._seen = self._table.write(adapters)

    def __setitem__(self, name: str, lora: Any) -> None:
        self._sync()
        super().__setitem__(name, lora)
        self._publish()

    def __delitem__(self, name: str) -> None:
        self._sync()
        super().__delitem__(name)
        self._publish()

    def __contains__(self, name: object) -> bool:
        self._sync()
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self._sync()
        return super().__getitem__(name)

    def __len__(self) -> int:
        self._sync()
        return super().__len__()

    def __iter__(self) -> Iterator[str]:
        self._sync()
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        """See dict."""
        self._sync()
        return super().get(name, default)

    def keys(self) -> Any:
        """See dict."""
        self._sync()
        return super().keys()

    def values(self) -> Any:
        """See dict."""
        self._sync()
        return super().values()

    def items(self) -> Any:
        """See dict."""
        self._sync()
        return super().items()


class SharedIds:
    """In place of vLLM's counter of adapter ids. Used under the table's lock."""

    def __init__(self, table: LoraTable) -> None:
        self._table = table

    def inc(self, _by: int = 1) -> int:
        """Return an id that no adapter of any worker has had."""
        return self._table.next_id()


def share(models: Any, table: LoraTable) -> None:
    """Have an `OpenAIServingModels`, just made, take its adapters from the table."""
    from vllm.lora.request import LoRARequest

    models.lora_requests = SharedLoras(table, LoRARequest)
    models.lora_id_counter = SharedIds(table)
    for name in ("load_lora_adapter", "unload_lora_adapter", "resolve_lora"):
        setattr(models, name, _one_at_a_time(table, getattr(models, name)))
    models.init_static_loras = _once(table, models.lora_requests, models.init_static_loras)


def _one_at_a_time(table: LoraTable, change: Callable[..., Any]) -> Callable[..., Any]:
    async def changed(*args: Any, **kwargs: Any) -> Any:
        async with table.locked():
            return await change(*args, **kwargs)

    return changed


def _once(table: LoraTable, loras: SharedLoras, load: Callable[[], Any]) -> Callable[[], Any]:
    """The first worker loads the command line's adapters; the others have them then."""

    async def init_static_loras() -> None:
        async with table.locked():
            if not table.statics_loaded:
                for name in list(loras):  # of a worker that died half-way
                    del loras[name]
                await load()
                table.statics_loaded = True

    return init_static_loras
