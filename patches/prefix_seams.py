"""Seams of the prefix cache: blocks that are kept for tenants, prefixes that are looked up.

Pure data.
"""

from __future__ import annotations

from .contracts import Target
from .seams import Seam

_UTILS = "vllm.v1.core.kv_cache_utils"
_POOL = "vllm.v1.core.block_pool"
_MANAGER = "vllm.v1.core.kv_cache_manager"
_SCHEDULER = "vllm.v1.core.sched.scheduler"


def _queue(method: str, *parameters: str) -> Target:
    return Target(
        module=_UTILS,
        qualname=f"FreeKVCacheBlockQueue.{method}",
        parameters=parameters,
        is_async=False,
    )


PREFIXES: tuple[Seam, ...] = (
    Seam(
        name="free_block_queue",
        feature="scheduler",
        why="a queue of ours takes the place of vLLM's, and keeps some blocks apart",
        targets=(
            # All that it knows: a copy of it has the same blocks.
            Target(
                module=_UTILS,
                qualname="FreeKVCacheBlockQueue.__init__",
                parameters=("blocks",),
                assigns=(
                    "self.num_free_blocks",
                    "self.fake_free_list_head",
                    "self.fake_free_list_tail",
                ),
            ),
            _queue("popleft"),
            _queue("popleft_n", "n"),
            _queue("remove", "block"),
            _queue("append", "block"),
            _queue("append_n", "blocks"),
            _queue("prepend_n", "blocks"),
            _queue("get_all_free_blocks"),
            Target(
                module=_UTILS,
                qualname="KVCacheBlock",
                kind="class",
                members=("block_id", "block_hash", "ref_cnt"),
            ),
        ),
    ),
    Seam(
        name="block_pool",
        feature="scheduler",
        why="every block is taken from that queue, put back and used again by these calls",
        targets=(
            Target(
                module=_POOL,
                qualname="BlockPool.__init__",
                assigns=("self.free_block_queue",),
            ),
            Target(
                module=_POOL,
                qualname="BlockPool.get_new_blocks",
                calls=("self.free_block_queue.popleft_n", "self._maybe_evict_cached_block"),
            ),
            Target(
                module=_POOL, qualname="BlockPool.touch", calls=("self.free_block_queue.remove",)
            ),
            # What has nothing cached goes to the front, so only the other end is ours to look at.
            Target(
                module=_POOL,
                qualname="BlockPool.free_blocks",
                calls=("self.free_block_queue.prepend_n", "self.free_block_queue.append_n"),
            ),
            Target(
                module=_POOL,
                qualname="BlockPool.get_num_free_blocks",
                reads=("self.free_block_queue.num_free_blocks",),
            ),
        ),
    ),
    Seam(
        name="prefix_lookup",
        feature="scheduler",
        why="among tenants, whoever has the longest prefix in the cache may be next",
        targets=(
            Target(
                module=_MANAGER,
                qualname="KVCacheManager.__init__",
                assigns=("self.coordinator", "self.enable_caching"),
            ),
            Target(
                module="vllm.v1.core.kv_cache_coordinator",
                qualname="UnitaryKVCacheCoordinator.find_longest_cache_hit",
                parameters=("block_hashes", "max_cache_hit_length"),
            ),
            Target(
                module="vllm.v1.request",
                qualname="Request.__init__",
                assigns=("self.block_hashes", "self.skip_reading_prefix_cache"),
            ),
        ),
    ),
    Seam(
        name="freed_by_request",
        feature="scheduler",
        why="whose blocks are freed is known from the request that the manager is given",
        targets=(
            Target(
                module=_MANAGER, qualname="KVCacheManager.__init__", assigns=("self.block_pool",)
            ),
            Target(
                module=_MANAGER,
                qualname="KVCacheManager.free",
                parameters=("request",),
                calls=("self.coordinator.free",),
            ),
            Target(
                module=_SCHEDULER,
                qualname="Scheduler._free_request_blocks",
                parameters=("request",),
                calls=("self.kv_cache_manager.free",),
            ),
            Target(
                module=_SCHEDULER,
                qualname="Scheduler._free_blocks",
                calls=("self._free_request_blocks",),
            ),
            Target(
                module=_SCHEDULER,
                qualname="Scheduler._preempt_request",
                calls=("self._free_request_blocks",),
            ),
        ),
    ),
)
