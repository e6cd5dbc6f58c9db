"""Runs real engines on the simulated GPU, in virtual time; prints what happened as JSON.

A program of its own, started by test_simulator.py: vLLM resolves its platform once per process, so
the simulated one cannot share a process with tests of others.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["VLLM_PLUGINS"] = "scalellm.sim"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

PROMPT = list(range(300, 330))
LONG_PROMPT = [300 + i * 7 % 400 for i in range(3000)]


def make_tokenizer(directory: Path) -> Path:
    """A byte-level BPE of a thousand tokens, trained on made-up words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    words = ["".join(rng.choices("aeinorst", k=rng.randint(2, 5))) for _ in range(2000)]
    tokenizer.train_from_iterator([" ".join(rng.choices(words, k=20)) for _ in range(500)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(directory)
    return directory


class Engine:
    """An LLM with what the scenarios look at."""

    def __init__(self, directory: Path, options: dict[str, Any], **arguments: Any) -> None:
        from vllm import LLM

        from scalellm_plugins import config
        from scalellm_plugins.simulator.executor import SimulatedExecutor
        from scalellm_plugins.simulator.timeline import VirtualClock

        config.raw_to_env({"sim": options})
        SimulatedExecutor.clock = VirtualClock()
        self.llm = LLM(str(directory), disable_log_stats=True, **arguments)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.executor = self.core.model_executor

    def generate(self, prompts: Iterable[list[int]], **sampling: Any) -> list[Any]:
        """One completion per prompt; sampling options as given."""
        from vllm import SamplingParams

        params = SamplingParams(**{"temperature": 0, "ignore_eos": True, **sampling})
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        return [output.outputs[0] for output in outputs]

    def timed(self, prompt: list[int], tokens: int) -> tuple[float, int]:
        """Device seconds and steps of one request."""
        timeline = self.executor.timeline
        busy, steps = timeline.busy_s, timeline.steps
        self.generate([prompt], max_tokens=tokens)
        return timeline.busy_s - busy, timeline.steps - steps


def plenty(directory: Path) -> dict[str, Any]:
    """An engine with a card's memory."""
    engine = Engine(
        directory,
        {"gpu": "h200", "model": "8b"},
        max_model_len=8192,
        max_num_batched_tokens=1024,
    )
    lengths = [1, 2, 17, 300]
    config = engine.core.vllm_config
    found: dict[str, Any] = {
        "executor": type(engine.executor).__name__,
        "asynchronous": config.scheduler_config.async_scheduling,
        "batches": engine.core.batch_queue_size,
        "blocks": config.cache_config.num_gpu_blocks,
        "utilization": config.cache_config.gpu_memory_utilization,
        "lengths": [
            len(engine.generate([PROMPT], max_tokens=length)[0].token_ids) for length in lengths
        ],
        "wanted_lengths": lengths,
        "remembered": None,
    }
    found["cold"] = engine.timed(LONG_PROMPT, 4)
    found["warm"] = engine.timed(LONG_PROMPT, 4)
    batch = [[*PROMPT, i] for i in range(8)]
    found["texts"] = [c.text for c in engine.generate(batch, max_tokens=120)]
    found["again"] = [c.text for c in engine.generate(reversed(batch), max_tokens=120)][::-1]
    found["tokens"] = [list(c.token_ids) for c in engine.generate(batch, max_tokens=120)]
    tokenizer = engine.llm.get_tokenizer()
    found["reencoded"] = [
        tokenizer.encode(text, add_special_tokens=False) for text in found["texts"]
    ]
    found["special"] = tokenizer.all_special_ids
    found["logprobs"] = [
        {token: entry.logprob for token, entry in position.items()}
        for position in engine.generate([PROMPT], max_tokens=3, logprobs=2)[0].logprobs
    ]
    found["json"] = _structured(engine)
    found["refused"] = _refused(lambda: engine.generate([PROMPT], prompt_logprobs=1))
    found["aborted"] = _abort(engine)
    engine.generate([PROMPT], max_tokens=1)
    found["remembered"] = len(engine.executor.requests)
    found["rpc"] = _refused(lambda: engine.llm.collective_rpc("load_weights"))
    return found


def _structured(engine: Engine) -> str:
    from vllm.sampling_params import StructuredOutputsParams

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    params = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    completion = engine.generate(
        [PROMPT], max_tokens=500, ignore_eos=False, structured_outputs=params
    )[0]
    return str(completion.text)


def _refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def _abort(engine: Engine) -> list[int]:
    """Abort one of two requests half-way; return the tokens of the other."""
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=50)
    for name in ("stays", "goes"):
        core.add_request(name, {"prompt_token_ids": PROMPT}, params)
    ids: list[int] = []
    for step in range(200):
        for output in core.step():
            if output.request_id.startswith("stays"):
                ids = list(output.outputs[0].token_ids)
        if step == 10:
            core.abort_request(["goes"])
        if not core.has_unfinished_requests():
            break
    return ids


def scarce(directory: Path) -> dict[str, Any]:
    """An engine with 20 blocks of KV cache, where requests have to be preempted."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    original = Scheduler._preempt_request

    def counted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return original(self, request, *args, **kwargs)

    Scheduler._preempt_request = counted
    engine = Engine(
        directory, {"gpu": "rtx4090", "model": "0.6b", "kv_blocks": 20}, max_model_len=256
    )
    batch = [[*PROMPT, i] for i in range(8)]
    completions = engine.generate(batch, max_tokens=120)
    Scheduler._preempt_request = original
    return {
        "blocks": engine.core.vllm_config.cache_config.num_gpu_blocks,
        "preemptions": len(preempted),
        "tokens": [list(c.token_ids) for c in completions],
    }


def synchronous(directory: Path) -> dict[str, Any]:
    """An engine that waits for each step before it schedules the next."""
    engine = Engine(directory, {}, max_model_len=256, async_scheduling=False)
    batch = [[*PROMPT, i] for i in range(8)]
    completions = engine.generate(batch, max_tokens=120)
    return {
        "batches": engine.core.batch_queue_size,
        "tokens": [list(c.token_ids) for c in completions],
    }


def unsupported(directory: Path) -> dict[str, Any]:
    """What is refused when the engine is built."""
    return {
        "unknown_gpu": _refused(lambda: Engine(directory, {"gpu": "h20"}, max_model_len=256)),
        "too_large": _refused(
            lambda: Engine(
                directory,
                {"gpu": "l4", "model": "70b", "tensor_parallel": 1},
                max_model_len=256,
            )
        ),
        "speculative": _refused(
            lambda: Engine(
                directory,
                {},
                max_model_len=256,
                speculative_config={"method": "ngram", "num_speculative_tokens": 2},
            )
        ),
    }


def main() -> None:
    """Print one JSON object on the last line of stdout."""
    from scalellm_plugins.simulator.model_dir import make_model_dir

    scratch = Path(sys.argv[1])
    directory = make_model_dir("8b", make_tokenizer(scratch / "tokenizer"), scratch / "model")
    scenarios = (plenty, scarce, synchronous, unsupported)
    found = {scenario.__name__: scenario(directory) for scenario in scenarios}
    print()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
