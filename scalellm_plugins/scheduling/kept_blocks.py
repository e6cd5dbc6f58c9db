"""Prefixes of tenants with a floor stay in the cache, whatever bursts of others go by.

vLLM keeps blocks that nobody uses in one queue, least recently used first; whoever needs blocks
takes them from its head, and what they had cached is gone. So one tenant's burst evicts everybody's
prefixes. Here a tenant's cached blocks, up to its floor, stand apart, behind all others: they are
taken when nothing else is free, since running work comes first, and then the oldest first. They
count as free throughout, so nothing else in vLLM knows of it.

A block belongs to whoever used it last, if that tenant has a floor, or else to whom it belonged
before: a prefix that is shared stays. With more cached than its floor, a tenant keeps what it used
last, and of one prompt its beginning, as vLLM frees the ends of prompts first.

All that is added is O(1) per block that is freed or taken, and nothing where it is not attached.

Follows `FreeKVCacheBlockQueue` of `vllm/v1/core/kv_cache_utils.py`, whose order of everything that
is not kept is as it was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue


class KeptBlocks(FreeKVCacheBlockQueue):  # type: ignore[misc]
    """vLLM's queue of free blocks, and those that are kept for tenants.

    Takes the place of `queue`, whose blocks it has from then on.
    """

    num_free_blocks: int
    """Kept ones included."""

    def __init__(self, queue: FreeKVCacheBlockQueue) -> None:
        # Its blocks are linked to one another and to two ends that are no blocks: those go over.
        self.__dict__.update(queue.__dict__)
        self.tenant: str | None = None
        """Whose blocks are being freed."""
        self._floors: Mapping[str, int] = {}
        self._kept: OrderedDict[int, Any] = OrderedDict()
        """Kept blocks by id, the oldest first."""
        self._of: dict[str, OrderedDict[int, None]] = {}
        """The same by tenant."""
        self._owners: dict[int, str] = {}
        """Id of a block that is kept, or was and is in use → its tenant."""

    def keep(self, floors: Mapping[str, int]) -> None:
        """Keep up to so many blocks for each of these tenants, and none for others."""
        self._floors = {tenant: most for tenant, most in floors.items() if most > 0}
        for tenant in list(self._of):
            self._shrink(tenant)

    def kept(self, tenant: str) -> int:
        """How many blocks are kept for a tenant now."""
        return len(self._of.get(tenant, ()))

    # What vLLM's pool calls

    def popleft(self) -> Any:
        return self.popleft_n(1)[0] if self.num_free_blocks else super().popleft()

    def popleft_n(self, n: int) -> list[Any]:
        short = n - (self.num_free_blocks - len(self._kept))
        if short > 0 and n <= self.num_free_blocks:
            for _ in range(short):
                self._give_up(next(iter(self._kept)))
        blocks: list[Any] = super().popleft_n(n)
        if self._owners:
            for block in blocks:
                self._owners.pop(block.block_id, None)
        return blocks

    def remove(self, block: Any) -> None:
        # It is used again: its owner is remembered until somebody overwrites it.
        if self._kept.pop(block.block_id, None) is None:
            super().remove(block)
            return
        self._of[self._owners[block.block_id]].pop(block.block_id)
        self.num_free_blocks -= 1

    def append(self, block: Any) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[Any]) -> None:
        """Take back blocks that have something cached, in the order of their eviction."""
        if not self._floors:
            super().append_n(blocks)
            return
        others = []
        for block in blocks:
            owner = self.tenant
            if owner not in self._floors:
                owner = self._owners.get(block.block_id)
            if owner is not None and owner in self._floors and block.block_hash is not None:
                self._keep(block, owner)
            else:
                others.append(block)
        super().append_n(others)

    def get_all_free_blocks(self) -> list[Any]:
        return [*super().get_all_free_blocks(), *self._kept.values()]

    # Inside

    def _keep(self, block: Any, owner: str) -> None:
        number = block.block_id
        self._kept[number] = block
        self._owners[number] = owner
        self._of.setdefault(owner, OrderedDict())[number] = None
        self.num_free_blocks += 1
        self._shrink(owner)

    def _shrink(self, tenant: str) -> None:
        """Keep no more than a tenant's floor: the rest is evicted like anybody's, the oldest of it
        first, but after what is free already."""
        kept, most = self._of.get(tenant), self._floors.get(tenant, 0)
        while kept and len(kept) > most:
            self._give_up(next(iter(kept)))
        if not kept:
            self._of.pop(tenant, None)

    def _give_up(self, number: int) -> None:
        """A kept block becomes one like any other."""
        self._of[self._owners.pop(number)].pop(number)
        block = self._kept.pop(number)
        self.num_free_blocks -= 1
        super().append_n([block])


def keep_blocks(manager: Any, tenant_of: Callable[[Any], str]) -> KeptBlocks:
    """Attach to vLLM's `KVCacheManager`, once; return what keeps blocks. Its floors are still to be
    told.

    Args:
        manager: of a scheduler without a KV connector, which would walk the queue itself.
        tenant_of: the tenant of a request.
    """
    pool = manager.block_pool
    if isinstance(pool.free_block_queue, KeptBlocks):
        return pool.free_block_queue
    queue = pool.free_block_queue = KeptBlocks(pool.free_block_queue)
    theirs = manager.free

    def free(request: Any) -> None:
        """Free a request's blocks, which are its tenant's."""
        queue.tenant = tenant_of(request)
        try:
            theirs(request)
        finally:
            queue.tenant = None

    manager.free = free
    return queue
