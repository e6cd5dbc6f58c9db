"""What does a chat cost from its messages to ids? vLLM's renderer and the fast lane's compared.

    python -m scalellm_plugins.benchmarks.prompt_cost [--model DIR] [--tokens 100000] [--json FILE]

A short chat, alternating its question, and a conversation of `--tokens` tokens whose second turn
adds the answer and a question; every repetition has texts of its own. vLLM's way is
`render_chat_async` of the renderer that its server uses, ours is render, plan, encode and commit in
the event loop's thread. The median of several repetitions counts; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scalellm_plugins.frontends.prompts import ChatPrompts

DEMO_MODEL = Path(__file__).resolve().parent.parent / "examples" / "demo_model"
SHORT_REPEATS = 400
LONG_REPEATS = 5
MESSAGE_WORDS = 350
CACHE_BYTES = 256 << 20

PROSE = """The committee met again on Thursday to go over the budget, and nobody was surprised that
the bridge came up first: "It has been closed since March," said the engineer, "and every week we
wait costs us 12,500 euros." She showed photographs of the northern pillar (see table 3) and of the
river, which is 4.2 metres higher than in 2019. def area(radius): return 3.14159 * radius ** 2
Größe, déjà vu, naïve; the rest of the meeting was about the library's opening hours."""

Message = dict[str, Any]


@dataclass
class Result:
    """One step: median wall-clock time over the repetitions."""

    step: str
    microseconds: float


class Texts:
    """Messages that no other repetition has seen, of words that every one has."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._words = PROSE.split()

    def short(self) -> list[Message]:
        """A system prompt that stays and a question that does not."""
        question = " ".join(self._rng.choices(self._words, k=12))
        system = "You are a helpful assistant. Answer in one sentence."
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]

    def turn(self, role: str) -> Message:
        """One message of a long conversation."""
        return {"role": role, "content": " ".join(self._rng.choices(self._words, k=MESSAGE_WORDS))}

    def conversation(self, count: Callable[[str], int], tokens: int) -> list[Message]:
        """Alternate user and assistant until there are `tokens`; the user has the last word."""
        messages = [self.turn("user")]
        total = count(messages[0]["content"])
        while total < tokens:
            messages += [self.turn("assistant"), self.turn("user")]
            total += sum(count(message["content"]) for message in messages[-2:])
        return messages


class Upstream:
    """vLLM's renderer, asked as its chat route asks it."""

    def __init__(self, model: str) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.renderers import ChatParams, TokenizeParams
        from vllm.renderers.registry import renderer_from_config

        self.config = EngineArgs(model, enforce_eager=True).create_engine_config()
        self.renderer = renderer_from_config(self.config)
        options = {"add_generation_prompt": True, "continue_final_message": False}
        self._chat = ChatParams(chat_template_kwargs={**options, "tokenize": False})
        # Longer than the demo model's context: what is measured ends before the model.
        self._tokens = TokenizeParams(max_total_tokens=1 << 20, add_special_tokens=False)

    async def ids(self, messages: list[Message]) -> list[int]:
        """Return the prompt's ids."""
        _, (prompt,) = await self.renderer.render_chat_async([messages], self._chat, self._tokens)
        ids: list[int] = prompt["prompt_token_ids"]
        return ids


def build(upstream: Upstream) -> ChatPrompts:
    """Our prompts for the same model."""
    prompts = ChatPrompts.build(
        tokenizer=upstream.renderer.tokenizer,
        model_config=upstream.config.model_config,
        chat_template=None,
        content_format="auto",
        default_template_kwargs=None,
        cache_bytes=CACHE_BYTES,
    )
    if isinstance(prompts, str) or prompts.chat_off or prompts.cache.off:
        reason = prompts if isinstance(prompts, str) else prompts.chat_off or prompts.cache.off
        sys.exit(f"prompt_cost: nothing to measure for this model: {reason}")
    return prompts


class Clock:
    """Collects the times of named steps."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self._last = 0.0

    def start(self) -> None:
        """The next step begins now."""
        self._last = time.perf_counter()

    def step(self, name: str) -> None:
        """The step that began last ends now, and the next one begins."""
        now = time.perf_counter()
        self.times.setdefault(name, []).append(now - self._last)
        self._last = time.perf_counter()

    def results(self) -> list[Result]:
        """Medians, in the order in which the steps first ended."""
        return [Result(name, statistics.median(t) * 1e6) for name, t in self.times.items()]


def ours(prompts: ChatPrompts, messages: list[Message], clock: Clock, name: str) -> list[int]:
    """Render and tokenize, step by step."""
    begin = time.perf_counter()
    clock.start()
    text = prompts.render(messages)
    assert text is not None  # these messages are of the simplest shape
    clock.step(f"{name}: render")
    plan = prompts.plan_chat(text)
    clock.step(f"{name}: plan")
    ids = plan.encode()
    clock.step(f"{name}: encode")
    plan.commit()
    clock.step(f"{name}: commit")
    clock.times.setdefault(f"{name}: all", []).append(time.perf_counter() - begin)
    return ids


async def measure(upstream: Upstream, tokens: int) -> tuple[list[Result], int]:
    """Take turns, so that a busy moment hits both; returns the results and the long prompt's ids.

    The first short chat of each side is not counted: it compiles and starts threads.
    """
    prompts, clock, texts = build(upstream), Clock(), Texts(1)
    ours(prompts, texts.short(), Clock(), "")
    await upstream.ids(texts.short())
    for _ in range(SHORT_REPEATS):
        messages = texts.short()
        expected = ours(prompts, messages, clock, "short chat, ours")
        clock.start()
        got = await upstream.ids(messages)
        clock.step("short chat, vLLM")
        check(got, expected)
    tokenizer = upstream.renderer.get_tokenizer()
    size = 0
    for _ in range(LONG_REPEATS):
        messages = texts.conversation(lambda text: len(tokenizer(text).input_ids), tokens)
        for turn in ("first turn", "second turn"):
            expected = ours(prompts, messages, clock, f"{turn}, ours")
            clock.start()
            got = await upstream.ids(messages)
            clock.step(f"{turn}, vLLM")
            check(got, expected)
            size = len(got)
            messages = [*messages, texts.turn("assistant"), texts.turn("user")]
    return clock.results(), size


def check(got: Sequence[int], expected: Sequence[int]) -> None:
    """Times of different work would mean nothing."""
    if got != expected:
        sys.exit("prompt_cost: vLLM and the fast lane do not give the same ids; not measured")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder with a tokenizer")
    parser.add_argument("--tokens", type=int, default=100_000, help="length of the first turn")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)
    for name, value in (("HF_HUB_OFFLINE", "1"), ("VLLM_LOGGING_LEVEL", "ERROR")):
        os.environ.setdefault(name, value)
    results, size = asyncio.run(measure(Upstream(options.model), options.tokens))
    medians = {result.step: result.microseconds for result in results}
    print(f"\nmedian wall-clock time; the second turn has {size:,} tokens")
    for step, microseconds in medians.items():
        unit = f"{microseconds / 1e3:10.2f} ms" if "turn" in step else f"{microseconds:10.1f} µs"
        print(f"{step:28}{unit}")
    share = medians["second turn, ours: all"] / medians["first turn, ours: all"]
    print(f"second turn / first turn    {share:10.1%}    (vLLM's own first turn: ", end="")
    print(f"{medians['second turn, ours: all'] / medians['first turn, vLLM']:.1%})")
    if options.json:
        document = {"tokens": size, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
