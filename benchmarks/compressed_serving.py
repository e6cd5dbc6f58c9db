"""What compression makes of a server: `scalellm compress`, and plain vLLM with what it wrote.

    python -m scalellm_plugins.benchmarks.compressed_serving [--kinds bf16,w8a8,int4]

Real vLLM on the CPU, without a plugin, and with ours for a kind with "+plugin" (quantization alone:
whose kernel multiplies), and the model of `quantized_serving`, 0.5B parameters, with
random weights in a checkpoint of 1 GB. Each kind is made by the command line once, in a process of
its own: seconds, and the largest resident set. Then the servers take turns, one after the other and
round by round, and decode as those of `quantized_serving` do. int8 (W8A16) is not served by
vLLM alone, which has no CPU kernel for it.

Peaks count the pages of a checkpoint that is mapped; they are the page cache's, and can be dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .quantized_serving import figures, show, write_model
from .report import machine, versions
from .server import exit_on_signals
from .systems import System

_EXAMPLES = Path(__file__).parents[1] / "examples"

KINDS: Mapping[str, tuple[str, ...]] = {
    "bf16": (),
    "w8a8": ("--scheme", "w8a8"),
    "int4": ("--scheme", "int4"),
    "int8": ("--scheme", "int8"),
    "drop6": ("--drop-layers", "6"),
    "ffn25": ("--prune-ffn", "0.25"),
    "drop6+ffn25+int4": ("--drop-layers", "6", "--prune-ffn", "0.25", "--scheme", "int4"),
}
"""Options of `scalellm compress`; of 24 layers, and of 4,864 channels."""

PLUGIN = "+plugin"
UNSERVED = {"int8": "no CPU kernel in vLLM for W8A16"}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m scalellm_plugins.benchmarks.compressed_serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kinds",
        default="bf16,w8a8,int4,int4+plugin,int8,int8+plugin,drop6,ffn25",
        help=f"{', '.join(KINDS)}; each also with {PLUGIN}",
    )
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--tokens", type=int, default=30, help="per answer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--calibration-tokens", type=int, default=1024)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args(argv)
    exit_on_signals()
    kinds = options.kinds.split(",")
    streams = [int(number) for number in options.streams.split(",")]
    made: dict[str, dict[str, Any]] = {}
    found: dict[str, list[dict[str, Any]]] = {k: [] for k in kinds if k not in UNSERVED}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {"bf16": write_weights(write_model(folder))}
        text = calibration_text(folder / "text.txt")
        for kind in (name.removesuffix(PLUGIN) for name in kinds):
            if kind not in models:
                models[kind] = folder / kind
                made[kind] = compress(kind, models, text, options.calibration_tokens)
                print(kind, json.dumps(made[kind]), flush=True)
        for _ in range(options.rounds):
            for kind in found:
                model = models[kind.removesuffix(PLUGIN)]
                plugins = ("scalellm.quantization",) if kind.endswith(PLUGIN) else ()
                served = figures(System(kind, "", plugins), model, streams, options.tokens)
                found[kind].append(served)
                print(kind, json.dumps(served), flush=True)
        bf16_mb = weights_mb(models["bf16"])
    print(f"| compress | s | peak GB | weights MB, of {bf16_mb} |\n|---|---|---|---|")
    for kind, row in made.items():
        print(f"| {kind} | {row['seconds']} | {row['peak_gb']} | {row['weights_mb']} |")
    show(found, streams)
    for kind, why in UNSERVED.items():
        print(f"{kind} is not served: {why}")
    if options.output:
        record = {
            "command": f"compressed_serving --kinds {options.kinds} --streams {options.streams} "
            f"--tokens {options.tokens} --rounds {options.rounds} "
            f"--calibration-tokens {options.calibration_tokens}",
            "machine": machine(),
            "versions": versions(),
            "compress": made | {"bf16": {"weights_mb": bf16_mb}},
            "rounds": found,
            "not_served": UNSERVED,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def write_weights(model: Path) -> Path:
    """Give a folder with a config.json random weights, as transformers initialises them.

    In a process of its own, which takes the memory with it.
    """
    code = (
        "import sys, torch; from transformers import AutoConfig, AutoModelForCausalLM as Model; "
        "config = AutoConfig.from_pretrained(sys.argv[1]); "
        "Model.from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(model)], check=True)
    return model


def calibration_text(path: Path) -> Path:
    """Write some text of the demo model's, whose tokenizer the model has."""
    command = [sys.executable, str(_EXAMPLES / "demo_text.py"), "--count", "400", "--seed", "7"]
    with path.open("w") as file:
        subprocess.run(command, check=True, stdout=file)
    return path


def compress(kind: str, models: Mapping[str, Path], text: Path, tokens: int) -> dict[str, Any]:
    """Run `scalellm compress`; return seconds, the process's largest resident set, and size."""
    command = [sys.executable, "-m", "scalellm_plugins.cli", "compress"]
    command += [str(models["bf16"]), str(models[kind]), *KINDS[kind], "--no-measure"]
    if {"--drop-layers", "--prune-ffn"} & set(KINDS[kind]):
        command += ["--calibration", str(text), "--calibration-tokens", str(tokens)]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return {
        "seconds": round(time.monotonic() - started, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "weights_mb": weights_mb(models[kind]),
    }


def weights_mb(model: Path) -> int:
    """Return the size of a checkpoint's weights, MB."""
    return round(sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e6)


if __name__ == "__main__":
    raise SystemExit(main())
