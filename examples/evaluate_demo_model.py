"""Judge the demo model, or a quantized or pruned copy of it, on the held-out questions.

The score is exact match: the share of replies that equal the only right answer, character for
character (outer white space aside). The questions come from `demo_text.py` and were never in the
training text. Two back ends:

    python examples/evaluate_demo_model.py                              # transformers, bf16, CPU
    python examples/evaluate_demo_model.py --url http://127.0.0.1:8000  # an OpenAI-like server

Exit status: 0, or 1 if the score is below --min-exact-match, or 2 if the judging failed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo_text

MAX_NEW_TOKENS = 80  # the longest right answer takes about 60
BATCH_SIZE = 64


class EvaluationError(RuntimeError):
    """The model or server could not be asked; the message says why."""


def select(limit: int | None) -> list[demo_text.Example]:
    """Return the held-out examples, or `limit` of them drawn evenly from all categories."""
    examples = demo_text.held_out_examples()
    if limit is None or limit >= len(examples):
        return examples
    by_category: dict[str, list[demo_text.Example]] = defaultdict(list)
    for example in random.Random(0).sample(examples, len(examples)):
        by_category[example.category].append(example)
    rounds = range(demo_text.HELD_OUT_PER_CATEGORY)
    ordered = [group[i] for i in rounds for group in by_category.values() if i < len(group)]
    return ordered[:limit]


def ask_transformers(examples: list[demo_text.Example], model_path: Path) -> list[str]:
    """Answer with transformers: bf16, greedy, in batches, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    if not (model_path / "config.json").is_file():
        raise EvaluationError(f"no checkpoint in {model_path}: config.json is missing")
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    return answer(examples, model, tokenizer)


def answer(examples: list[demo_text.Example], model: Any, tokenizer: Any) -> list[str]:
    """Answer with a model of transformers that is loaded, by its tokenizer."""
    import torch

    replies = [""] * len(examples)
    # Neighbours of like length waste little padding.
    prompts = [
        tokenizer.apply_chat_template(e.messages, add_generation_prompt=True, tokenize=False)
        for e in examples
    ]
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        inputs = tokenizer(
            [prompts[i] for i in chosen],
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            replies[i] = text
    return replies


def _request(url: str, body: dict[str, Any] | None, key: str | None) -> dict[str, Any]:
    """Send one JSON request; raise EvaluationError with the server's words if it fails."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        words = error.read().decode(errors="replace")[:500]
        raise EvaluationError(f"{url} answered {error.code}: {words}") from error
    except (OSError, ValueError) as error:
        raise EvaluationError(f"cannot ask {url}: {error}") from error


def ask_server(
    examples: list[demo_text.Example],
    url: str,
    name: str | None = None,
    key: str | None = None,
    concurrency: int = 16,
) -> list[str]:
    """Answer with an OpenAI-compatible server; without `name`, with the first model it lists."""
    base = url.rstrip("/").removesuffix("/v1")
    if name is None:
        listed = _request(f"{base}/v1/models", None, key).get("data") or []
        if not listed:
            raise EvaluationError(f"{base}/v1/models lists no model")
        name = listed[0]["id"]

    def ask(example: demo_text.Example) -> str:
        body = {
            "model": name,
            "messages": example.messages,
            "temperature": 0.0,
            "max_tokens": MAX_NEW_TOKENS,
        }
        reply = _request(f"{base}/v1/chat/completions", body, key)
        try:
            return reply["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError) as error:
            raise EvaluationError(f"the server's reply has no message: {reply}") from error

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(ask, examples))


def score(examples: list[demo_text.Example], replies: list[str]) -> dict[str, Any]:
    """Return totals, scores per category (shares from 0 to 1) and the wrong replies."""
    right: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    for example, reply in zip(examples, replies, strict=True):
        match = reply.strip() == example.answer
        right[example.category].append(match)
        if not match:
            wrong.append(
                {
                    "category": example.category,
                    "question": example.messages[-1]["content"],
                    "expected": example.answer,
                    "reply": reply,
                }
            )
    total = sum(sum(matches) for matches in right.values())
    return {
        "questions": len(examples),
        "right": total,
        "exact_match": total / len(examples),
        "categories": {
            name: {"questions": len(m), "right": sum(m), "exact_match": sum(m) / len(m)}
            for name, m in right.items()
        },
        "wrong": wrong,
    }


def show(result: dict[str, Any], shown_errors: int) -> None:
    """Print the scores and some of the wrong replies."""
    for name, entry in result["categories"].items():
        share = f"{entry['exact_match']:7.1%}"
        print(f"{name:<16} {entry['right']:4d} of {entry['questions']:4d}  {share}")
    print(f"{'total':<16} {result['right']:4d} of {result['questions']:4d}  "
          f"{result['exact_match']:7.1%}")  # fmt: skip
    for entry in result["wrong"][:shown_errors]:
        print(f"  {entry['category']}: {entry['question']!r}: expected {entry['expected']!r}, "
              f"got {entry['reply']!r}")  # fmt: skip


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Exact match of the demo model on held-out text.")
    parser.add_argument(
        "--backend",
        choices=("transformers", "server"),
        help="default: server if --url is given, else transformers",
    )
    parser.add_argument("--url", help="server to ask, for example http://127.0.0.1:8000")
    parser.add_argument("--served-name", help="model name at the server (default: its first)")
    parser.add_argument("--api-key", help="bearer token of the server, if it wants one")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once (16)")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(__file__).parent / "demo_model",
        help="checkpoint directory for transformers (default examples/demo_model)",
    )
    parser.add_argument("--limit", type=int, help="ask only so many questions, of all categories")
    parser.add_argument("--json", type=Path, help="write scores and wrong replies to this file")
    parser.add_argument("--min-exact-match", type=float, help="fail below this share, e.g. 0.95")
    parser.add_argument("--show-errors", type=int, default=10, help="wrong replies to print (10)")
    args = parser.parse_args(arguments)
    if args.backend is None:
        args.backend = "server" if args.url else "transformers"
    if args.backend == "server" and not args.url:
        parser.error("--backend server needs --url")
    if args.backend == "transformers" and args.url:
        parser.error("--url goes with --backend server, not with transformers")
    if args.concurrency < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--concurrency and --limit must be at least 1")
    if args.min_exact_match is not None and not 0.0 <= args.min_exact_match <= 1.0:
        parser.error("--min-exact-match is a share between 0 and 1")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Ask, score, report; return the exit status."""
    args = parse_arguments(arguments)
    examples = select(args.limit)
    start = time.monotonic()
    try:
        if args.backend == "server":
            replies = ask_server(
                examples, args.url, args.served_name, args.api_key, args.concurrency
            )
        else:
            replies = ask_transformers(examples, args.model)
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {"backend": args.backend, "seconds": round(time.monotonic() - start, 1)}
    result.update(score(examples, replies))
    show(result, args.show_errors)
    print(f"{result['seconds']} s")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    if args.min_exact_match is not None and result["exact_match"] < args.min_exact_match:
        print(f"error: exact match {result['exact_match']:.1%} is below the wanted "
              f"{args.min_exact_match:.1%}", file=sys.stderr)  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
