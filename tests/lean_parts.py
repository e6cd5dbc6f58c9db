"""Steps of a model that is not there, for a scheduler, and all that a scheduler knows."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from typing import Any

from vllm.v1.outputs import ModelRunnerOutput


class Driver:
    """A scheduler, and steps of a model under way. What the model says depends on the request."""

    def __init__(self, scheduler: Any, vocabulary: int = 50) -> None:
        self.scheduler = scheduler
        self.under_way: deque[tuple[Any, dict[str, list[int]]]] = deque()
        self._vocabulary = vocabulary

    def schedule(self) -> Any:
        """Begin a step; those of no tokens are not run, as in vLLM's engine."""
        output = self.scheduler.schedule()
        if output.total_num_scheduled_tokens:
            tokens = {}
            for name in output.num_scheduled_tokens:
                one = self.scheduler.requests[name]
                # Decided when it is sampled, which in vLLM's engine is now.
                position = one.num_computed_tokens
                chosen = random.Random(f"{name} {position}").randrange(self._vocabulary)
                tokens[name] = [] if one.is_prefill_chunk else [chosen]
            self.under_way.append((output, tokens))
        return output

    def update(self) -> Any:
        """End the oldest step; the model has its own order of requests."""
        output, tokens = self.under_way.popleft()
        names = sorted(tokens, key=lambda name: random.Random(name).random())
        return self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: number for number, name in enumerate(names)},
                sampled_token_ids=[list(tokens[name]) for name in names],
            ),
        )


# What is compared


def plain(value: Any) -> Any:
    """A value as one that can be compared; objects by their fields."""
    if isinstance(value, dict):
        return [(plain(key), plain(one)) for key, one in value.items()]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple | deque):
        return [plain(one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "__struct_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    return value


_NOT_STATE = {"sampling_params", "_block_hasher", "scalellm_plan", "events", "prefill_stats"}


def state(scheduler: Any) -> dict[str, Any]:
    """All that a scheduler knows."""
    manager = scheduler.kv_cache_manager
    pool = manager.block_pool
    requests = {}
    for name, one in scheduler.requests.items():
        fields = {key: plain(value) for key, value in vars(one).items() if key not in _NOT_STATE}
        del fields["output_token_ids"], fields["all_token_ids"]  # views
        fields["events"] = [event.type for event in one.events]
        fields["new"] = one.prefill_stats is not None
        requests[name] = fields
    found = {
        "requests": requests,
        "running": [one.request_id for one in scheduler.running],
        "waiting": [one.request_id for one in scheduler.waiting],
        "finished": plain(scheduler.finished_req_ids),
        "before": plain(scheduler.prev_step_scheduled_req_ids),
        "step": scheduler.current_step,
        "free": [block.block_id for block in pool.free_block_queue.get_all_free_blocks()],
        "blocks": [(b.block_id, b.ref_cnt, plain(b.block_hash)) for b in pool.blocks],
    }
    for number, one in enumerate(manager.coordinator.single_type_managers):
        found[f"blocks of {number}"] = {
            name: [block.block_id for block in blocks] for name, blocks in one.req_to_blocks.items()
        }
        found[f"cached of {number}"] = dict(one.num_cached_block)
    return found


def said(outputs: dict[int, Any]) -> Any:
    """What an update tells clients: outputs by request, and once the statistics."""
    told = {}
    statistics = []
    for client, message in outputs.items():
        fields = plain(message)
        del fields["timestamp"]
        stats = fields.pop("scheduler_stats")
        if stats is not None:
            statistics.append(stats)
        for one in fields["outputs"]:
            one["events"] = one["events"] and [event["type"] for event in one["events"]]
        fields["outputs"] = {one["request_id"]: one for one in fields["outputs"]}
        if fields["outputs"] or fields["finished_requests"]:
            told[client] = fields
    return told, statistics
