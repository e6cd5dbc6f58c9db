"""vLLM's executor on a simulated GPU: it keeps the time of a step and computes nothing.

It runs inside EngineCore's process and thread, as vLLM's own executor for one GPU does, and with
asynchronous scheduling: EngineCore submits step n + 1 while step n is on the device, then waits for
step n. The contract followed is that of `v1/executor/{abstract,uniproc_executor}.py` and of
`EngineCore.step_with_batch_queue`, vLLM 0.29 to 0.33:

    execute_model(scheduled)   puts the step on the timeline; its future says None, "not sampled"
    sample_tokens(grammar)     the future of the step's tokens, due at the step's deadline

What a real worker's CPU does in the same thread (input preparation, kernel launches; 1-3 ms per
step without a CUDA graph) is not simulated: an engine measured over this executor is measured
against the device alone.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, ModelRunnerOutput

from scalellm_plugins.errors import ConfigError

from .banner import banner
from .options import sim_config, simulation
from .platform import SimulatedGpuPlatform
from .steps import Requests, Step
from .timeline import Clock, StepFuture, Timeline
from .tokens import table, vocabulary_of, word_ids

logger = init_logger(__name__)

T = TypeVar("T")

KV_LAYOUT = "LBNHC"
"""Any of vLLM's layouts would do: the cache does not exist."""


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


class SimulatedExecutor(Executor):  # type: ignore[misc]
    """Answers what EngineCore asks of its workers, from a roofline instead of a device."""

    supports_pp = False

    clock: Clock | None = None
    """Replaced in tests, before an engine is built; None is the machine's own clock."""

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """As on CUDA."""
        return True

    def _init_executor(self) -> None:
        simulated = simulation(sim_config(), self.parallel_config.tensor_parallel_size)
        self.simulation = simulated
        self.roofline = simulated.roofline
        self.timeline = Timeline(self.clock, simulated.speed)
        self.vocab_size = self.model_config.get_vocab_size()
        self.stop_ids = _stop_ids(self.model_config)
        words = word_ids(vocabulary_of(self.model_config.tokenizer or self.model_config.model))
        self.requests = Requests(self.roofline, table(words, self.vocab_size, avoid=self.stop_ids))
        self._pending: tuple[Step, float] | None = None
        self._logprobs: dict[str, int] = {}
        self._not_sampled: Future[None] = _done(None)
        self._loras: set[int] = set()

    # Start-up: what a worker would have found on its device.

    def get_kv_cache_specs(self) -> list[dict[str, KVCacheSpec]]:
        """The preset model's layers, whatever model is served: one card's share of KV heads."""
        model = self.roofline.model
        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size,
            num_kv_heads=max(1, model.kv_heads // model.tensor_parallel),
            head_size=model.head_dim,
            dtype=torch.bfloat16,
        )
        return [{f"model.layers.{i}.self_attn.attn": spec for i in range(model.layers)}]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        """One layout; which one decides nothing."""
        return [[KV_LAYOUT]]

    def set_kv_cache_layout(self, *_: Any) -> None:
        """There is no cache to lay out (0.33 passes an interleave size too)."""

    def determine_available_memory(self) -> list[int]:
        """Bytes left on one card for KV cache."""
        return [self.roofline.kv_capacity_bytes(self.cache_config.gpu_memory_utilization)]

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """Allocate nothing, and say so as loudly as possible."""
        blocks = kv_cache_configs[0].num_blocks
        text = banner(self.simulation, blocks, self.cache_config.block_size)
        logger.warning("\n%s", text)

    def compile_or_warm_up_model(self) -> None:
        """There is no model."""

    # Per step.

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Put the step on the timeline. See the module's text."""
        finished = scheduler_output.finished_req_ids
        if finished:
            self.requests.finish(finished)
            if self._logprobs:
                for request_id in finished:
                    self._logprobs.pop(request_id, None)
        if not scheduler_output.total_num_scheduled_tokens:
            return _done(EMPTY_MODEL_RUNNER_OUTPUT) if non_block else EMPTY_MODEL_RUNNER_OUTPUT
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            if params is not None and params.num_logprobs is not None:
                self._logprobs[request.req_id] = params.num_logprobs
        step = self.requests.step(scheduler_output)
        self._pending = step, self.timeline.submit(step.seconds)
        return self._not_sampled if non_block else None

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        """The tokens of the step put on the timeline last, when that step ends."""
        assert self._pending is not None, "sample_tokens without execute_model"
        (step, deadline), self._pending = self._pending, None
        if grammar_output is not None:
            self._apply_grammar(step, grammar_output)
        output = ModelRunnerOutput(
            req_ids=step.request_ids,
            req_id_to_index=step.index,
            sampled_token_ids=step.tokens,
            logprobs=self._logprobs_of(step) if self._logprobs else None,
        )
        future = StepFuture(output, deadline, self.timeline.clock)
        return future if non_block else future.result()

    def execute_dummy_batch(self) -> None:
        """The step of a data-parallel rank without requests."""
        deadline = self.timeline.submit(self.roofline.step_seconds(0, 1, 1))
        self.timeline.clock.sleep_until(deadline)

    def take_draft_token_ids(self) -> None:
        """Speculative decoding is refused when the server starts."""

    def _apply_grammar(self, step: Step, grammar: GrammarOutput) -> None:
        """Replace tokens that a grammar forbids: by a stop token if it allows one (so that answers
        end), else by one that it allows, chosen by the token it replaces.
        """
        masks = np.ascontiguousarray(grammar.grammar_bitmask).view(np.uint8)
        for row, request_id in enumerate(grammar.structured_output_request_ids):
            tokens = step.tokens[step.index[request_id]] if request_id in step.index else []
            if not tokens:
                continue
            bits = np.unpackbits(masks[row], bitorder="little")[: self.vocab_size]
            stop = next((id_ for id_ in self.stop_ids if id_ < len(bits) and bits[id_]), None)
            if stop is not None:
                tokens[0] = stop
            elif not bits[tokens[0]]:
                allowed = np.flatnonzero(bits)
                tokens[0] = int(allowed[tokens[0] % len(allowed)]) if len(allowed) else tokens[0]

    def _logprobs_of(self, step: Step) -> LogprobsLists | None:
        """Made-up log-probabilities for the batch: the sampled token at 3/4, the others halving."""
        width = max((self._logprobs.get(id_, -1) for id_ in step.request_ids), default=-1)
        if any(self._logprobs.get(id_) == -1 for id_ in step.request_ids):
            width = self.vocab_size - 1  # -1 asks for the whole vocabulary
        if width < 0:
            return None
        ids = np.empty((len(step.tokens), width + 1), dtype=np.int32)
        for row, tokens in enumerate(step.tokens):
            sampled = tokens[0] if tokens else 0
            ids[row] = (sampled + np.arange(width + 1)) % self.vocab_size
        values = np.log(0.75) - np.log(3) * (np.arange(width + 1) > 0)
        values = values - np.log(2) * np.maximum(0, np.arange(width + 1))
        return LogprobsLists(
            ids,
            np.broadcast_to(values.astype(np.float32), ids.shape),
            np.ones(len(ids), dtype=np.int32),
        )

    # Everything else that EngineCore, or a user through it, asks of workers.

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,  # noqa: ARG002 the contract's signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """Answer for the one worker that there is not.

        Raises:
            NotImplementedError: the method needs a worker; the text names it.
        """
        name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
        answer = getattr(self, f"_rpc_{name}", None) if isinstance(method, str) else None
        if answer is None and name not in _NOTHING_TO_DO:
            raise NotImplementedError(
                f"{name}: the simulated GPU has no worker that could run it; "
                "leave scalellm.sim out of --plugins to use a real device"
            )
        result = [answer(*args, **(kwargs or {})) if answer else None]
        return _done(result) if non_block else result

    def _rpc_get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def _rpc_supports_draft_weight_updates(self) -> bool:
        return False

    def _rpc_add_lora(self, lora_request: Any) -> bool:
        self._loras.add(lora_request.lora_int_id)
        return True

    def _rpc_remove_lora(self, lora_id: int) -> bool:
        self._loras.discard(lora_id)
        return True

    def _rpc_pin_lora(self, lora_id: int) -> bool:
        return lora_id in self._loras

    def _rpc_list_loras(self) -> set[int]:
        return set(self._loras)

    def check_health(self) -> None:
        """Always well."""

    def shutdown(self) -> None:
        """Nothing to release, but the platform has to know: see its `is_cpu`."""
        SimulatedGpuPlatform.shut_down = True


_NOTHING_TO_DO = frozenset(
    {
        "update_max_model_len",
        "reset_mm_cache",
        "reset_encoder_cache",
        "sleep",
        "wake_up",
        "discard",
        "synchronize_device",
        "profile",
        "get_simple_cpu_offload_num_cpu_blocks",
    }
)
"""Worker methods that succeed without doing anything."""


def _stop_ids(model_config: Any) -> list[int]:
    """Ids that end an answer: never said unless a grammar asks for the end."""
    found = getattr(model_config.hf_text_config, "eos_token_id", None)
    ids = set(found if isinstance(found, list) else [] if found is None else [found])
    generation = model_config.try_get_generation_config().get("eos_token_id")
    ids.update(generation if isinstance(generation, list) else [generation])
    ids.discard(None)
    return sorted(ids)


def refuse(vllm_config: Any) -> None:
    """Raise for what cannot be simulated, while the server is still starting.

    Raises:
        ConfigError: names the option and why.
    """
    reasons = {
        "--speculative-config": vllm_config.speculative_config is not None,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--pipeline-parallel-size": vllm_config.parallel_config.pipeline_parallel_size > 1,
        "--runner pooling": vllm_config.model_config is not None
        and vllm_config.model_config.runner_type == "pooling",
        "--kv-cache-dtype": vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16"),
    }
    for option, given in reasons.items():
        if given:
            raise ConfigError(
                f"{option}: not simulated, so its effect on the timeline would be missing. "
                f"Drop {option}, or leave scalellm.sim out of --plugins"
            )
