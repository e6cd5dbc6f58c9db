"""The demo model drafts for itself: pruned by `scalellm compress`, and checked by the whole one.

    python examples/speculative_draft.py --drop-layers 2

makes the draft, serves the demo model on plain vLLM with it (method "draft_model"), asks the
held-out questions and prints which share of the drafted tokens the model accepted, by position.
With greedy decoding the answers are the model's own, whatever the draft is worth: the score must
be that of the model alone. By hand:

    python examples/demo_text.py --count 2000 --seed 7 --jsonl > chats.jsonl
    scalellm compress examples/demo_model draft --drop-layers 2 --calibration chats.jsonl
    vllm serve examples/demo_model --enforce-eager --max-model-len 2048 --speculative-config \\
        '{"method": "draft_model", "model": "draft", "num_speculative_tokens": 3}'
    curl -s http://127.0.0.1:8000/metrics | grep spec_decode
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo_text
import evaluate_demo_model as evaluation

MODEL = Path(__file__).resolve().parent / "demo_model"
BIN = Path(sys.executable).parent
START_LIMIT_S = 300.0
CONVERSATIONS, SEED = 2000, 7  # not the seeds that the model was trained with


def make_draft(folder: Path, drop_layers: int) -> Path:
    """Prune the demo model; the calibration text is of the kind that it was trained on."""
    chats = folder / "chats.jsonl"
    with chats.open("w") as file:
        for messages in islice(demo_text.training_conversations(SEED), CONVERSATIONS):
            file.write(json.dumps({"messages": messages}) + "\n")
    draft = folder / "draft"
    command = [BIN / "scalellm", "compress", MODEL, draft, "--drop-layers", str(drop_layers)]
    subprocess.run([*command, "--calibration", chats], check=True)
    return draft


def serve(draft: Path, tokens: int, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start plain vLLM; returns the process and its URL once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    speculation = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": tokens}
    command = [BIN / "vllm", "serve", MODEL, "--enforce-eager", "--max-model-len", "2048"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--speculative-config", json.dumps(speculation)],
            stdout=output,
            stderr=subprocess.STDOUT,
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
    """The counters of speculative decoding: {name, or position: value}."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    found = re.findall(r"^vllm:spec_decode_num_(\w+)_total\{(.*?)\} (\S+)$", text, re.MULTILINE)
    values = {}
    for name, labels, value in found:
        position = re.search(r'position="(\d+)"', labels)
        values[f"position {position[1]}" if position else name] = float(value)
    return values


def main() -> int:
    """Make, serve, ask, report."""
    parser = argparse.ArgumentParser(description="Acceptance rate of the pruned demo model.")
    parser.add_argument("--drop-layers", type=int, default=1, help="of the draft, of 5 (1)")
    parser.add_argument("--tokens", type=int, default=3, help="drafted tokens at once (3)")
    parser.add_argument("--limit", type=int, help="ask only so many of the 760 questions")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draft = make_draft(folder, args.drop_layers)
        process, url = serve(draft, args.tokens, folder / "server.log")
        try:
            examples = evaluation.select(args.limit)
            right = evaluation.score(examples, evaluation.ask_server(examples, url))["right"]
            counted = counters(url)
        finally:
            process.terminate()
            process.wait()
    drafts = counted["drafts"]
    accepted = counted["accepted_tokens"]
    print(f"\n{right} of {len(examples)} questions right")
    print(f"accepted: {accepted / counted['draft_tokens']:.1%} of {counted['draft_tokens']:,.0f}; "
          f"{1 + accepted / drafts:.2f} tokens per step of the model")  # fmt: skip
    for place in range(args.tokens):
        print(f"  token {place + 1} of a draft: {counted[f'position {place}'] / drafts:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
