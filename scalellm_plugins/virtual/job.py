"""What a simulation is told and what it says, as structs that cross to its process and back.

Times are in seconds of virtual time, which begins at 0 with the workload.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

_Tokens = Annotated[int, Meta(ge=1)]
_Positive = Annotated[float, Meta(gt=0)]


class Request(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One request of a workload."""

    at: Annotated[float, Meta(ge=0)]
    """When it arrives."""
    tenant: str
    prompt: _Tokens
    output: _Tokens
    """Tokens that it asks for, and gets: nothing stops earlier."""
    weight: _Positive = 1.0
    priority: int = 0
    """Lower is more urgent, as in vLLM."""
    prefix: Annotated[int, Meta(ge=0)] = 0
    """Tokens at the beginning of the prompt that all requests of the tenant share."""
    ttft_ms: _Positive | None = None
    tpot_ms: _Positive | None = None
    deadline_ms: _Positive | None = None
    """Targets, from the arrival on; the engine is told of them too."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The simulated server, as options of the same names; None: as `vllm serve` chooses."""

    gpu: str = "h200"
    model: str = "8b"
    tensor_parallel: int | None = None
    max_model_len: int
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_blocks: int | None = None
    prefix_caching: bool = True


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Which scheduler runs, and with which options."""

    label: str
    """As the user wrote it."""
    ours: bool
    """Whether the scheduler is this package's; vLLM's AsyncScheduler otherwise."""
    order: Literal["fcfs", "priority"] = "fcfs"
    """vLLM's --scheduling-policy."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Of the section `scalellm.scheduler`."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One run: a workload, in order of arrival, under one policy."""

    settings: Settings
    policy: Policy
    requests: list[Request]


Outcome = Literal["done", "dropped", "refused", "failed"]
"""dropped: the engine gave it up (504); refused: over a limit (429); failed: anything else."""


class Record(msgspec.Struct, kw_only=True, array_like=True):
    """What became of a request, in the workload's order."""

    scheduled: float | None = None
    """When it first got a share of a step."""
    first: float | None = None
    """When its first token was there."""
    last: float | None = None
    """When it ended, with its last token or without."""
    tokens: int = 0
    preemptions: int = 0
    outcome: Outcome = "failed"
    reason: str = ""


class Sample(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One moment, for plots."""

    at: float
    waiting: int
    running: int
    kv: float
    """Share of KV blocks in use, 0-1."""
    served: list[float]
    """Service so far by tenant, in weighted tokens per weight, in the order of `Run.tenants`."""


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """The largest difference in service between two tenants while both had requests waiting."""

    tokens: float
    """Weighted tokens per weight."""
    pair: tuple[str, str]
    until: float
    """When it had come about."""


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """The engine that ran, resolved."""

    vllm: str
    scheduler: str
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_blocks: int
    block_size: int


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of a run when it is over."""

    engine: Engine
    records: list[Record]
    tenants: list[str]
    samples: list[Sample]
    seconds: float
    """When the last request ended."""
    steps: int
    busy_s: float
    """Seconds that the simulated GPU worked."""
    tokens: int
    """Output tokens that the engine sent."""
    kv_mean: float
    kv_max: float
    """Share of KV blocks in use, 0-1: mean over time, and most."""
    kv_left: int
    """Blocks that were still in use when all was over: none, or there is a leak."""
    gap: Gap | None = None
    """None with one tenant, or where never two of them waited."""
