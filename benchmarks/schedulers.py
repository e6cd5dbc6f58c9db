"""Schedulers of vLLM without an engine: the demo model's configuration, one group of blocks."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

MODEL = Path(__file__).parents[1] / "examples" / "demo_model"
EOS = 2

init_none_hash(sha256)


@functools.cache
def _config(asynchronous: bool) -> VllmConfig:
    model = ModelConfig(model=str(MODEL), dtype="float32", skip_tokenizer_init=True)
    scheduler = SchedulerConfig(
        max_model_len=model.max_model_len, is_encoder_decoder=False, max_num_batched_tokens=8192
    )
    config = VllmConfig(
        model_config=model,
        scheduler_config=scheduler,
        cache_config=CacheConfig(block_size=16),
        device_config=DeviceConfig("cpu"),
    )
    # On the CPU vLLM turns it off; the scheduler itself does not mind.
    config.scheduler_config.async_scheduling = asynchronous
    return config


def scheduler(
    kind: Any,
    asynchronous: bool,
    *,
    blocks: int = 10_000,
    block_size: int = 16,
    sequences: int = 256,
    budget: int = 8192,
    longest: int = 4096,
    caching: bool = True,
    policy: str = "fcfs",
    watermark: float = 0.0,
) -> Any:
    """Make a scheduler of class `kind`; `longest`: tokens of a sequence."""
    config = copy.copy(_config(asynchronous))
    for name in ("model_config", "scheduler_config", "cache_config"):
        object.__setattr__(config, name, copy.copy(getattr(config, name)))
    config.model_config.__dict__["max_model_len"] = longest
    config.scheduler_config.__dict__.update(
        max_num_seqs=sequences,
        max_num_batched_tokens=budget,
        max_num_scheduled_tokens=None,
        max_model_len=longest,
        policy=policy,
        watermark=watermark,
    )
    config.cache_config.__dict__.update(
        block_size=block_size, enable_prefix_caching=caching, num_gpu_blocks=blocks
    )
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.half)
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=block_size,
        log_stats=True,
    )


def request(
    name: str,
    prompt: list[int],
    most: int,
    *,
    block_size: int = 16,
    caching: bool = True,
    client: int = 0,
    priority: int = 0,
    arrival: float = 0.0,
    **params: Any,
) -> Request:
    """Make a request of at most `most` tokens."""
    sampling = SamplingParams(max_tokens=most, temperature=0.0, **params)
    sampling.update_from_generation_config({}, EOS)
    return Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling_params=sampling,
        pooling_params=None,
        client_index=client,
        arrival_time=arrival,
        priority=priority,
        block_hasher=get_request_block_hasher(block_size, sha256) if caching else None,
    )
