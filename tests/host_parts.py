"""A policy in vLLM's scheduler, a model that is not there, and what clients get."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from typing import Any

import pytest
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT as NOTHING

from scalellm_plugins.benchmarks.schedulers import request, scheduler
from scalellm_plugins.engine.plain import whole
from scalellm_plugins.scheduling import host, lean, requests
from scalellm_plugins.scheduling.lean import LeanAsyncScheduler, LeanScheduler
from scalellm_plugins.scheduling.policy import Policy

from .lean_parts import Driver

KINDS = {True: LeanAsyncScheduler, False: LeanScheduler}


class Clock:
    """The engine's clock, which stands still between steps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


def stop_clocks(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Have the host see a clock that a test moves."""
    made = Clock()
    for module in (host, requests):
        monkeypatch.setattr(module, "time", made)
    return made


class Run:
    """A scheduler with a policy, its model, and what clients have got."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        policy: type[Policy] | None = None,
        *,
        asynchronous: bool = True,
        options: dict[str, Any] | None = None,
        tenants: bool = False,
        **others: Any,
    ) -> None:
        own = options or {"policy": "priority"}
        frontend = {"tenants": "file"} if tenants else {}
        config = {"scheduler": own, "frontend": frontend}
        monkeypatch.setenv("SCALELLM_CONFIG", json.dumps(config))
        if policy is not None:  # no plugin is installed for it
            monkeypatch.setattr(lean, "make", lambda _names, engine, own: policy(engine, own))
        self.depth = 2 if asynchronous else 1
        self.driver = Driver(scheduler(KINDS[asynchronous], asynchronous, **others))
        self.scheduler = self.driver.scheduler
        self.block_size = others.get("block_size", 16)
        self.got: dict[str, list[int]] = defaultdict(list)
        self.ends: dict[str, Any] = {}

    def request(
        self,
        name: str,
        prompt: int = 8,
        most: int = 10,
        *,
        prompt_of: str = "",
        priority: int = 0,
        **extra: Any,
    ) -> Any:
        """A request that came just now; prompts differ by name. `extra`: its extra arguments."""
        return request(
            name,
            [sum((prompt_of or name).encode())] * prompt,
            most,
            block_size=self.block_size,
            priority=priority,
            arrival=host.time.time(),
            ignore_eos=True,
            **({"extra_args": extra} if extra else {}),
        )

    def add(self, name: str, *args: Any, **more: Any) -> None:
        """Have a request come."""
        self.scheduler.add_request(self.request(name, *args, **more))

    def step(self) -> Any:
        """One turn of the engine; the step that it has scheduled."""
        output = self.driver.schedule()
        if self.driver.under_way and (
            len(self.driver.under_way) >= self.depth or not output.total_num_scheduled_tokens
        ):
            self.hear(self.driver.update())
        elif not output.total_num_scheduled_tokens:
            self.hear(self.scheduler.update_from_output(output, NOTHING))
        return output

    def hear(self, outputs: dict[int, Any]) -> None:
        for message in outputs.values():
            for output in whole(message.outputs):
                assert output.request_id not in self.ends, "nothing comes after the end"
                self.got[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    self.ends[output.request_id] = output

    def finish(self) -> None:
        for _ in range(5000):
            if not (self.scheduler.has_requests() or self.driver.under_way):
                break
            self.step()
        assert not self.scheduler.requests
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "all blocks are free"
        assert not self.scheduler._host._works, "nothing is kept of what has ended"
        assert not self.scheduler._host.queue._number_of

    def running(self) -> list[str]:
        return [one.request_id for one in self.scheduler.running]


def expected(name: str, prompt: int, most: int) -> list[int]:
    """What the model of `Driver` says of a request that nobody disturbs."""
    first = prompt
    return [
        random.Random(f"{name} {position}").randrange(50) for position in range(first, first + most)
    ]
