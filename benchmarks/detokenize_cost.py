"""What does a token cost from its id to text? vLLM's detokenizer and the fast lane's, side by side.

    python -m scalellm_plugins.benchmarks.detokenize_cost [--tokenizer DIR] [--tokens 512]
        [--json FILE]

One request after another, one token per step, in one process; a round goes over all of them, and
the fastest of several rounds counts. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scalellm_plugins.frontends.detokenize import Detokenizer
from scalellm_plugins.frontends.stops import StopText

ROUNDS = 15
"""Fewer than ten and a busy machine shows."""

STOP = ["###", "\n\nUser:", "</answer>"]
"""Never in SAMPLE: a request that stops costs less."""

SAMPLE = """The quick brown fox jumps over the lazy dog, and 2 + 3 = 5. "Well," said she, "it's \
only a dog!" Größe, déjà vu, 你好, мир 😀. A list: 1) apples; 2) pears.
def area(radius): return 3.14159 * radius ** 2
"""


@dataclass
class Result:
    """One way to decode, in µs per token of an answer of `tokens` tokens."""

    way: str
    tokens: int
    us_per_token: float


class Ways:
    """Each method decodes one answer."""

    def __init__(self, tokenizer: Any, tokens: int) -> None:
        ids = tokenizer.encode(SAMPLE, add_special_tokens=False)
        self.ids = (ids * (tokens // len(ids) + 1))[:tokens]
        self._tokenizer = tokenizer
        started = time.perf_counter()
        self.detokenizer = Detokenizer.build(tokenizer)
        self.build_s = time.perf_counter() - started
        self._library = Detokenizer(tokenizer._tokenizer, None, "to compare with")

    def all(self) -> dict[str, Callable[[], object]]:
        """Return {name: decode one answer}."""
        return {
            "vLLM: update + get_next_output_text": lambda: self.vllm([]),
            "vLLM: the same with 3 stop strings": lambda: self.vllm(STOP),
            "feed, from DecodeStream": lambda: self.feed(self._library),
            "feed": lambda: self.feed(self.detokenizer),
            "feed_json": self.feed_json,
            "StopText: push + delta with 3 stop strings": self.stop_text,
            "text, all at once": lambda: self.detokenizer.text([], self.ids),
        }

    def vllm(self, stop: list[str]) -> None:
        """vLLM's detokenizer, as its output processor calls it for each step."""
        from vllm import SamplingParams
        from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

        request: Any = SimpleNamespace(
            request_id="r", prompt_token_ids=[], sampling_params=SamplingParams(stop=stop)
        )
        detokenizer = FastIncrementalDetokenizer(self._tokenizer, request)
        update, text = detokenizer.update, detokenizer.get_next_output_text
        for token_id in self.ids:
            update([token_id], False)
            text(False, True)

    def feed(self, detokenizer: Detokenizer) -> None:
        """Text for each token."""
        feed = detokenizer.stream([]).feed
        for token_id in self.ids:
            feed(token_id)

    def feed_json(self) -> None:
        """JSON for each token."""
        feed_json = self.detokenizer.stream([]).feed_json
        for token_id in self.ids:
            feed_json(token_id)

    def stop_text(self) -> None:
        """Text for each token, with stop strings."""
        stream = self.detokenizer.stream([])
        stops = StopText(STOP, include_stop=False, min_tokens=0)
        for token_id in self.ids:
            stops.push(stream, [token_id], stop_terminated=False)
            stops.delta(finished=False)


def measure(ways: Ways) -> list[Result]:
    """Run rounds over all ways; the fastest run of each counts."""
    runs = ways.all()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    count = len(ways.ids)
    return [Result(name, count, 1e6 * seconds / count) for name, seconds in best.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns an exit code."""
    parser = argparse.ArgumentParser(
        prog="detokenize_cost", description="Compare what detokenizing costs."
    )
    parser.add_argument(
        "--tokenizer", default="examples/demo_model", help="folder with a tokenizer.json"
    )
    parser.add_argument("--tokens", type=int, default=512, help="length of an answer")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args(argv)

    from vllm.tokenizers import get_tokenizer

    ways = Ways(get_tokenizer(args.tokenizer), args.tokens)
    print(f"{ways.detokenizer.kind}: {ways.detokenizer.why}; built in {ways.build_s:.3f} s\n")
    results = measure(ways)
    print(f"| {args.tokens} tokens | µs per token |\n|---|---|")
    for result in results:
        print(f"| {result.way} | {result.us_per_token:.2f} |")
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
