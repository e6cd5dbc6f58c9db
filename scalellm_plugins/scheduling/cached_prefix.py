"""How much of a waiting request's prompt is in vLLM's prefix cache, without using any of it."""

from __future__ import annotations

from typing import Any


def cached_tokens(manager: Any, request: Any) -> int:
    """Return for how many tokens of its prompt a request would find KV blocks, were it admitted.

    Blocks are neither taken nor moved in their order of eviction, and nothing is counted as a hit
    or miss. Costs a dictionary look-up per block that is found.

    Args:
        manager: vLLM's `KVCacheManager`.
        request: vLLM's; as in vLLM, its last token is computed whatever is cached.
    """
    if not manager.enable_caching or request.skip_reading_prefix_cache:
        return 0
    found = manager.coordinator.find_longest_cache_hit(
        request.block_hashes, request.num_prompt_tokens - 1
    )
    return int(found[1])
