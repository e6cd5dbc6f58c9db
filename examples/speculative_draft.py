"""The demo model drafts for itself: pruned by `scalellm compress`, and checked by the whole one.

    python examples/speculative_draft.py --drop-layers 1 2

makes the drafts, serves the demo model on plain vLLM without one and with each (method
"draft_model"), asks the held-out questions and prints which share of the drafted tokens the model
accepted, by position. With greedy decoding the answers are the model's own, whatever the draft is
worth: the score must be that of the model alone. Then the servers answer one question at a time,
in turns, and tokens per second are printed: all tokens by all time, prompts included. By hand:

    python examples/demo_text.py --count 2000 --seed 7 --jsonl > chats.jsonl
    scalellm compress examples/demo_model draft --drop-layers 2 --calibration chats.jsonl
    vllm serve examples/demo_model --enforce-eager --max-model-len 2048 --speculative-config \\
        '{"method": "draft_model", "model": "draft", "num_speculative_tokens": 3}'
    curl -s http://127.0.0.1:8000/metrics | grep spec_decode
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo_text
import evaluate_demo_model as evaluation

MODEL = Path(__file__).resolve().parent / "demo_model"
BIN = Path(sys.executable).parent
START_LIMIT_S = 300.0
CONVERSATIONS, SEED = 2000, 7  # not the seeds that the model was trained with


def calibration_text(path: Path) -> Path:
    """Write text of the kind that the demo model was trained on."""
    with path.open("w") as file:
        for messages in islice(demo_text.training_conversations(SEED), CONVERSATIONS):
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def make_draft(draft: Path, drop_layers: int, chats: Path) -> Path:
    """Prune the demo model."""
    command = [BIN / "scalellm", "compress", MODEL, draft, "--drop-layers", str(drop_layers)]
    subprocess.run([*command, "--calibration", chats], check=True)
    return draft


def serve(draft: Path | None, tokens: int, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start plain vLLM; returns the process and its URL once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [BIN / "vllm", "serve", MODEL, "--enforce-eager", "--max-model-len", "2048"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if draft:
        speculation: dict[str, Any] = {"method": "draft_model", "model": str(draft)}
        speculation["num_speculative_tokens"] = tokens
        command += ["--speculative-config", json.dumps(speculation)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},  # GB; several servers share memory
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except OSError:
            time.sleep(0.5)  # polling another process: there is nothing to wait on
        else:
            return process, url
    process.terminate()
    sys.exit(f"vLLM did not start; the end of its log:\n{log.read_text()[-2000:]}")


def counters(url: str) -> dict[str, float]:
    """Tokens made, and the counters of speculative decoding: {name, or position: value}."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    found = re.findall(
        r"^vllm:(?:spec_decode_num_)?(\w+)_total\{(.*?)\} (\S+)$", text, re.MULTILINE
    )
    values = {}
    for name, labels, value in found:
        position = re.search(r'position="(\d+)"', labels)
        values[f"position {position[1]}" if position else name] = float(value)
    return values


def judge(url: str, limit: int | None) -> dict[str, Any]:
    """Ask the held-out questions; returns the score and what became of drafted tokens."""
    examples = evaluation.select(limit)
    found = evaluation.score(examples, evaluation.ask_server(examples, url))
    counted = counters(url)
    result = {"right": found["right"], "questions": len(examples)}
    if "drafts" not in counted:
        return result
    drafts, accepted = counted["drafts"], counted["accepted_tokens"]
    positions = sorted(name for name in counted if name.startswith("position"))
    return result | {
        "drafted_tokens": counted["draft_tokens"],
        "accepted": accepted / counted["draft_tokens"],
        "tokens_per_step": 1 + accepted / drafts,
        "accepted_by_position": [counted[name] / drafts for name in positions],
    }


def speed(url: str, questions: int) -> float:
    """Return tokens per second of answers one after the other."""
    before, started = counters(url)["generation_tokens"], time.monotonic()
    evaluation.ask_server(evaluation.select(questions), url, concurrency=1)
    elapsed = time.monotonic() - started
    return (counters(url)["generation_tokens"] - before) / elapsed


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print a line for each server, and its rounds beside the plain one's."""
    plain = statistics.median(results["no draft"]["tokens_per_s"])
    for name, result in results.items():
        median = statistics.median(result["tokens_per_s"])
        rounds = ", ".join(f"{speed:.0f}" for speed in result["tokens_per_s"])
        print(f"\n{name}: {result['right']} of {result['questions']} questions right; one stream "
              f"{median:.0f} tok/s ({median / plain:.2f} x; rounds {rounds})")  # fmt: skip
        if "accepted" not in result:
            continue
        print(f"  accepted: {result['accepted']:.1%} of {result['drafted_tokens']:,.0f}; "
              f"{result['tokens_per_step']:.2f} tokens per step of the model")  # fmt: skip
        for place, share in enumerate(result["accepted_by_position"], 1):
            print(f"  token {place} of a draft: {share:.1%}")


def main() -> int:
    """Make, serve, ask, report."""
    parser = argparse.ArgumentParser(description="What the pruned demo model is worth as a draft.")
    parser.add_argument(
        "--drop-layers", type=int, nargs="+", default=[1], help="of each draft, of 5 (1)"
    )
    parser.add_argument("--tokens", type=int, default=3, help="drafted tokens at once (3)")
    parser.add_argument("--limit", type=int, help="ask only so many of the 760 questions")
    parser.add_argument("--rounds", type=int, default=4, help="of timed answers (4)")
    parser.add_argument("--timed", type=int, default=20, help="questions of a round (20)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    processes, urls = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chats = calibration_text(folder / "chats.jsonl")
        drafts = {f"{dropped} of 5 layers dropped": dropped for dropped in args.drop_layers}
        try:
            for number, (label, dropped) in enumerate({"no draft": 0, **drafts}.items()):
                draft = make_draft(folder / label, dropped, chats) if dropped else None
                process, url = serve(draft, args.tokens, folder / f"server{number}.log")
                processes.append(process)
                urls[label] = url
                results[label] = judge(url, args.limit) | {"tokens_per_s": []}
            for _ in range(args.rounds):
                for label, url in urls.items():
                    results[label]["tokens_per_s"].append(speed(url, args.timed))
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
    show(results)
    if args.json:
        command = f"speculative_draft.py --drop-layers {' '.join(map(str, args.drop_layers))} "
        command += f"--tokens {args.tokens} --rounds {args.rounds} --timed {args.timed}"
        command += f" --limit {args.limit}" if args.limit else ""
        args.json.write_text(json.dumps({"command": command, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
