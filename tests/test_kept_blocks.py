"""Blocks that are kept for tenants with a floor: in the queue, and under vLLM's scheduler."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock  # noqa: E402
from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

from scalellm_plugins.benchmarks.schedulers import request, scheduler  # noqa: E402
from scalellm_plugins.scheduling.cached_prefix import cached_tokens  # noqa: E402
from scalellm_plugins.scheduling.fair import TENANT  # noqa: E402
from scalellm_plugins.scheduling.kept_blocks import KeptBlocks, keep_blocks  # noqa: E402
from scalellm_plugins.scheduling.lean import LeanAsyncScheduler  # noqa: E402
from scalellm_plugins.scheduling.requests import tenant_of  # noqa: E402

from .lean_parts import Driver, plain, state  # noqa: E402

BLOCKS = 12


class Block(KVCacheBlock):  # type: ignore[misc]
    """Has something cached or not, as the test says."""

    cached = False

    @property
    def block_hash(self) -> Any:
        return "hash" if self.cached else None


class Queues:
    """Blocks as vLLM's pool hands them out and takes them back, and what is expected of them."""

    def __init__(self, floors: dict[str, int]) -> None:
        self.blocks = [Block(number) for number in range(BLOCKS)]
        self.queue = KeptBlocks(FreeKVCacheBlockQueue(self.blocks))
        self.queue.keep(floors)
        self.floors = floors
        self.used: list[tuple[str, list[Any]]] = []

    def take(self, number: int) -> list[Any]:
        number = min(number, self.queue.num_free_blocks)
        before = set(self.queue._kept)
        others = self.queue.num_free_blocks - len(before)
        taken = self.queue.popleft_n(number)
        assert len({block.block_id for block in taken}) == number
        lost = [block.block_id for block in taken if block.block_id in before]
        assert len(lost) == max(0, number - others), "kept ones go last"
        for block in taken:
            block.cached = False
        return taken

    def free(self, tenant: str, blocks: list[Any], cached: int) -> None:
        for place, block in enumerate(blocks):
            block.cached = block.cached or place < cached
        self.queue.tenant = tenant
        self.queue.prepend_n([block for block in blocks if not block.cached])
        self.queue.append_n([block for block in reversed(blocks) if block.cached])
        self.queue.tenant = None

    def check(self) -> None:
        free = self.queue.get_all_free_blocks()
        assert len(free) == self.queue.num_free_blocks
        ids = [block.block_id for block in free]
        ids += [block.block_id for _, blocks in self.used for block in blocks]
        assert sorted(ids) == list(range(BLOCKS)), "none is lost, none is there twice"
        for tenant in "abc":
            assert self.queue.kept(tenant) <= self.floors.get(tenant, 0)
        assert len(self.queue._kept) == sum(map(self.queue.kept, "abc"))
        assert all(self.blocks[number].cached for number in self.queue._kept)
        assert set(self.queue._kept) <= set(self.queue._owners)


OPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, BLOCKS), st.sampled_from("abc")),
        st.tuples(st.just("free"), st.integers(0, 9), st.integers(0, BLOCKS)),
        st.tuples(st.just("use again"), st.integers(0, BLOCKS - 1), st.sampled_from("abc")),
        st.tuples(st.just("floors"), st.integers(0, 6), st.integers(0, 6)),
    ),
    max_size=40,
)


@settings(max_examples=300)
@given(OPS)
def test_no_block_is_lost_and_kept_ones_go_last(ops: list[tuple[str, Any, Any]]) -> None:
    made = Queues({"a": 4, "b": 3})
    for what, first, second in ops:
        if what == "take" and (taken := made.take(first)):
            made.used.append((second, taken))
        elif what == "free" and made.used:
            tenant, blocks = made.used.pop(first % len(made.used))
            made.free(tenant, blocks, second)
        elif what == "use again" and made.blocks[first] in made.queue.get_all_free_blocks():
            made.queue.remove(made.blocks[first])
            made.used.append((second, [made.blocks[first]]))
        elif what == "floors":
            made.floors = {"a": first, "b": second}
            made.queue.keep(made.floors)
        made.check()


@given(st.lists(st.integers(1, 5), max_size=20), st.booleans())
def test_without_floors_the_order_is_vllms(sizes: list[int], cached: bool) -> None:
    made = Queues({})
    theirs = FreeKVCacheBlockQueue([Block(number) for number in range(BLOCKS)])
    for size in sizes:
        ours = made.take(size)
        blocks = theirs.popleft_n(size)
        assert [block.block_id for block in ours] == [block.block_id for block in blocks]
        made.free("a", ours, size if cached else 0)
        (theirs.append_n if cached else theirs.prepend_n)(blocks[::-1] if cached else blocks)
    assert not made.queue._owners


def test_of_a_prompt_the_beginning_is_kept_and_of_several_the_last() -> None:
    made = Queues({"a": 3})
    one, other = made.take(2), made.take(5)
    made.free("a", one, 2)
    made.free("a", other, 5)
    assert {*made.queue._kept} == {block.block_id for block in other[:3]}


def test_a_shared_prefix_stays_its_tenants() -> None:
    made = Queues({"a": 3})
    prefix = made.take(3)
    made.free("a", prefix, 3)
    for block in prefix:
        made.queue.remove(block)
    assert made.queue.kept("a") == 0
    made.free("stranger", prefix, 0)
    assert made.queue.kept("a") == 3
    taken = made.take(BLOCKS)
    made.free("stranger", taken, BLOCKS)
    assert made.queue.kept("a") == 0, "what was overwritten is nobody's"


def test_what_lost_what_it_had_cached_is_nobodys() -> None:
    made = Queues({"a": 3})
    (block,) = made.take(1)
    made.free("a", [block], 1)
    made.queue.remove(block)
    block.cached = False  # the cache was reset while it was in use
    made.free("a", [block], 0)
    (again,) = made.take(1)
    assert again is block
    made.free("stranger", [block], 1)
    assert made.queue.kept("a") == 0


def test_what_has_nothing_cached_is_not_kept() -> None:
    """vLLM puts blocks that are still read for a while behind all others, too."""
    made = Queues({"a": 3})
    block = made.take(1)[0]
    made.queue.tenant = "a"
    made.queue.append(block)
    assert made.queue.kept("a") == 0
    assert made.queue.get_all_free_blocks()[-1] is block


def test_the_last_blocks_are_handed_out_whoever_they_are_kept_for() -> None:
    made = Queues({"a": BLOCKS})
    made.free("a", made.take(BLOCKS), BLOCKS)
    assert made.queue.kept("a") == BLOCKS
    assert made.queue.popleft().block_id == BLOCKS - 1, "the end of what is oldest"
    assert len(made.queue.popleft_n(BLOCKS - 1)) == BLOCKS - 1
    assert made.queue.num_free_blocks == 0
    with pytest.raises(ValueError, match="No free blocks"):
        made.queue.popleft()


# Under vLLM's scheduler

SIZE, POOL = 4, 41
"""Tokens of a block, and blocks; one of them is vLLM's own."""


class Burst:
    """One tenant's prompt, then a burst of another's, each with prompts of its own."""

    def __init__(self, kind: Any) -> None:
        self.driver = Driver(
            scheduler(kind, True, blocks=POOL, block_size=SIZE, sequences=4, longest=100)
        )
        self.manager = self.driver.scheduler.kv_cache_manager
        self.number = 0

    def run(self, tenant: str, prompt: list[int], most: int = 2) -> int:
        """Serve a request; return how many tokens of its prompt were cached."""
        self.number += 1
        name = f"{tenant}-{self.number}"
        extra = {TENANT: tenant}
        one = request(name, prompt, most, block_size=SIZE, ignore_eos=True, extra_args=extra)
        self.driver.scheduler.add_request(one)
        output = self.driver.schedule()
        (new,) = output.scheduled_new_reqs
        while self.driver.scheduler.has_requests():
            if not output.total_num_scheduled_tokens or len(self.driver.under_way) > 1:
                self.driver.update()
            output = self.driver.schedule()
        while self.driver.under_way:
            self.driver.update()
        return int(new.num_computed_tokens)

    def flood(self, tenant: str, number: int = 12) -> None:
        for start in range(number):
            self.run(tenant, [7 + start] * 32)


PREFIX = list(range(100, 132))


@pytest.mark.parametrize("kind", [AsyncScheduler, LeanAsyncScheduler])
@pytest.mark.parametrize(
    ("floors", "hit"),
    [
        (None, 0),
        ({}, 0),
        ({"flood": 40}, 0),
        ({"mine": 3}, 12),
        ({"mine": 20}, 28),  # vLLM computes the last block again, for its last token's logits
        ({"mine": 20, "flood": 20}, 28),
    ],
)
def test_a_burst_of_others_evicts_no_more_than_a_floor_leaves(
    kind: Any, floors: dict[str, int] | None, hit: int
) -> None:
    burst = Burst(kind)
    if floors is not None:
        keep_blocks(burst.manager, tenant_of).keep(floors)
    assert burst.run("mine", PREFIX) == 0
    burst.flood("flood")
    assert burst.run("mine", PREFIX) == hit


def test_what_is_freed_for_no_request_is_nobodys() -> None:
    burst = Burst(AsyncScheduler)
    kept = keep_blocks(burst.manager, tenant_of)
    kept.keep({"mine": 3})
    burst.run("mine", PREFIX)
    assert kept.kept("mine") == 3
    assert kept.tenant is None


def test_a_prefix_is_looked_up_as_it_would_be_found() -> None:
    burst = Burst(AsyncScheduler)
    burst.run("mine", PREFIX)
    before = state(burst.driver.scheduler)
    for prompt in (PREFIX, PREFIX[:13], [*PREFIX[:10], 1, 2, 3], [9] * 20, [1]):
        asks = request("asks", prompt, 1, block_size=SIZE)
        found = cached_tokens(burst.manager, asks)
        assert state(burst.driver.scheduler) == before, "it moves nothing"
        assert found == Burst.run(burst, "mine", prompt), prompt
        before = state(burst.driver.scheduler)
    asks = request("asks", PREFIX, 1, block_size=SIZE, prompt_logprobs=1)
    assert cached_tokens(burst.manager, asks) == 0, "all of its prompt is computed"
    assert cached_tokens(scheduler(AsyncScheduler, True, caching=False).kv_cache_manager, asks) == 0


def test_ones_own_burst_evicts_ones_own_prefixes() -> None:
    burst = Burst(AsyncScheduler)
    keep_blocks(burst.manager, tenant_of).keep({"mine": 20})
    burst.run("mine", PREFIX)
    burst.flood("mine")
    assert burst.run("mine", PREFIX) == 0


def test_running_work_comes_first() -> None:
    """All blocks but what one request needs are kept: it runs, and gets what it needs."""
    burst = Burst(LeanAsyncScheduler)
    kept = keep_blocks(burst.manager, tenant_of)
    kept.keep({"mine": POOL})
    burst.flood("mine")
    assert kept.kept("mine") > 30
    assert burst.run("other", [5] * 60, 40) == 0
    assert burst.manager.block_pool.get_num_free_blocks() == POOL - 1


def test_what_is_preempted_is_kept_while_others_grow() -> None:
    burst = Burst(LeanAsyncScheduler)
    kept = keep_blocks(burst.manager, tenant_of)
    kept.keep({"mine": 20})
    made = [
        request(
            name, [number] * 40, 60, block_size=SIZE, ignore_eos=True, extra_args={TENANT: name}
        )
        for number, name in enumerate(("theirs", "other", "mine"))
    ]
    for one in made:
        burst.driver.scheduler.add_request(one)
    while made[-1].status is not RequestStatus.PREEMPTED:
        burst.driver.schedule()
        if len(burst.driver.under_way) > 1:
            burst.driver.update()
    assert kept.kept("mine") > 3
    while burst.driver.scheduler.has_requests():
        burst.driver.schedule()
        if burst.driver.under_way:
            burst.driver.update()
    assert burst.manager.block_pool.get_num_free_blocks() == POOL - 1


def test_a_cache_that_was_reset_keeps_what_comes_after() -> None:
    """Blocks that were kept have nothing cached any more: they are the first to make room."""
    burst = Burst(AsyncScheduler)
    kept = keep_blocks(burst.manager, tenant_of)
    kept.keep({"mine": 8})
    burst.run("mine", [1] * 32)
    assert kept.kept("mine") == 8
    assert burst.driver.scheduler.reset_prefix_cache()
    burst.run("mine", PREFIX)
    burst.flood("flood")
    assert burst.run("mine", PREFIX) == 28


def test_attached_twice_is_attached_once() -> None:
    burst = Burst(AsyncScheduler)
    first = keep_blocks(burst.manager, tenant_of)
    free = burst.manager.free
    assert keep_blocks(burst.manager, tenant_of) is first
    assert burst.manager.free is free


def test_without_floors_the_scheduler_does_the_same() -> None:
    """Step by step, under pressure: preemption, prefixes, aborts."""
    made = [
        Driver(scheduler(LeanAsyncScheduler, True, blocks=24, block_size=SIZE, sequences=6))
        for _ in range(2)
    ]
    keep_blocks(made[1].scheduler.kv_cache_manager, tenant_of)
    for number in range(80):
        outputs = []
        for driver in made:
            extra = {TENANT: "ab"[number % 2]}
            one = request(
                f"r{number}",
                [number % 5] * (1 + number % 20),
                1 + number % 30,
                block_size=SIZE,
                ignore_eos=True,
                extra_args=extra,
            )
            driver.scheduler.add_request(one)
            if number % 9 == 8:
                gone = [f"r{number}", f"r{number // 2}"]
                driver.scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
            outputs.append(plain(driver.schedule()))
            if len(driver.under_way) > 1:
                driver.update()
        assert outputs[0] == outputs[1]
        assert state(made[0].scheduler) == state(made[1].scheduler)
