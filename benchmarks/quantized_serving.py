"""What quantization makes of a server: decode tokens per second, time to load, memory.

    python -m scalellm_plugins.benchmarks.quantized_serving [--methods none,scalellm_int4]

Real vLLM on the CPU, and a model of 0.5B parameters, in the shapes of Qwen2.5-0.5B, with weights
that are random (`--load-format dummy`). The servers take turns, one after the other and round by
round; each decodes with 1, 8 and 64 streams that begin together: greedy, `ignore_eos`, short
prompts, answers in one piece. Tokens per second are all tokens by the time until the last answer,
the better of two tries. A method with "+head" has the output layer in 8 bits, too.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import procstat
from .server import Server, exit_on_signals
from .systems import System, Target

_DEMO = Path(__file__).parents[1] / "examples" / "demo_model"

SHAPES: Mapping[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 4096,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A config.json: 358M parameters in linear layers, 136M in the embedding, which is the lm_head."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m scalellm_plugins.benchmarks.quantized_serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--methods", default="none,scalellm_int8,scalellm_int4")
    parser.add_argument("--streams", default="1,8,64")
    parser.add_argument("--tokens", type=int, default=40, help="per answer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args(argv)
    exit_on_signals()
    methods = options.methods.split(",")
    streams = [int(number) for number in options.streams.split(",")]
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        for _ in range(options.rounds):
            for method in methods:
                found[method].append(measure(model, method, streams, options.tokens))
                print(method, json.dumps(found[method][-1]), flush=True)
    show(found, streams)
    if options.output:
        record = {
            "command": f"quantized_serving --methods {options.methods} --streams "
            f"{options.streams} --tokens {options.tokens} --rounds {options.rounds}",
            "rounds": found,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def write_model(folder: Path) -> Path:
    """Write a checkpoint without weights: `SHAPES`, and the demo model's tokenizer."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPES))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_DEMO / name, model / name)
    return model


def measure(model: Path, method: str, streams: Sequence[int], tokens: int) -> dict[str, Any]:
    """Start a server that quantizes dummy weights, and return its figures."""
    args: tuple[str, ...] = ("--load-format", "dummy")
    quantization, _, head = method.partition("+")
    if quantization != "none":
        args += ("--quantization", quantization)
    if head:
        args += ("--scalellm.quantization.lm_head_8bit", "true")
    return figures(System(method, "", plugins=("scalellm",), args=args), model, streams, tokens)


def figures(system: System, model: Path, streams: Sequence[int], tokens: int) -> dict[str, Any]:
    """Start a server, and return its figures: seconds, GB, tokens per second by streams."""
    args = (*system.args, "--enforce-eager", "--max-model-len", "1024")
    system = replace(system, args=args, env={"VLLM_CPU_KVCACHE_SPACE": "1"})
    with tempfile.TemporaryDirectory() as folder:
        server = Server(system, Target(model, gpu=None, preset=None), Path(folder))
        try:
            started = time.monotonic()
            server.start()
            server.wait_ready(300.0, lambda _seconds: None)
            ready = time.monotonic() - started
            peak = procstat.peak_rss_bytes(server.processes())
            speeds = {}
            for number in streams:
                speeds[number] = max(decode(server, number, tokens) for _ in range(2))
            held = procstat.pss_bytes(server.processes())
        finally:
            server.stop()
    return {
        "ready_s": round(ready, 1),
        "peak_gb": round(peak / 1e9, 2),
        "held_gb": round(held / 1e9, 2),
        "tokens_per_s": {number: round(speed, 1) for number, speed in speeds.items()},
    }


def decode(server: Server, streams: int, tokens: int) -> float:
    """Return tokens per second of so many answers at once."""
    # Greedy: random sampling over 150,000 words would cost more than the model.
    body = {"model": "bench", "prompt": [5, 6, 7, 8], "max_tokens": tokens}
    body |= {"ignore_eos": True, "temperature": 0}

    def ask(_: int) -> None:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=120)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        connection.close()

    with ThreadPoolExecutor(streams) as threads:
        started = time.monotonic()
        list(threads.map(ask, range(streams)))
        return streams * tokens / (time.monotonic() - started)


def show(found: Mapping[str, Sequence[Mapping[str, Any]]], streams: Sequence[int]) -> None:
    """Print medians of the rounds as a table."""
    heads = ["ready s", "peak GB", "held GB", *(f"tok/s at {n}" for n in streams)]
    print(f"| method | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for method, rounds in found.items():
        cells = [
            statistics.median([one[key] for one in rounds])
            for key in ("ready_s", "peak_gb", "held_gb")
        ]
        cells += [statistics.median([one["tokens_per_s"][n] for one in rounds]) for n in streams]
        print(f"| {method} | {' | '.join(f'{cell:.4g}' for cell in cells)} |")


if __name__ == "__main__":
    raise SystemExit(main())
