"""What each way of `scalellm compress` makes of the demo model: size, KL, and right answers.

    python -m scalellm_plugins.benchmarks.compression_quality --output FILE.json

Calibration text is drawn from `examples/demo_text.py`, by a seed that the model was not trained
with; the answers are judged by `examples/evaluate_demo_model.py` (760 held-out questions, exact
match) in transformers, which computes with the dequantized weights. Run in the repository.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from scalellm_plugins.compression.recipe import Recipe
from scalellm_plugins.compression.report import Report
from scalellm_plugins.compression.work import Job, compress

from .report import machine, versions

TOKENS = 32768
RECIPES = {
    "int8": Recipe("int8", tokens=TOKENS),
    "w8a8": Recipe("w8a8", tokens=TOKENS),
    "int4": Recipe("int4", tokens=TOKENS),
    "int4, groups of 32": Recipe("int4", group_size=32, tokens=TOKENS),
    "int4, zero points": Recipe("int4", symmetric=False, tokens=TOKENS),
    "1 layer dropped": Recipe(drop_layers=1, tokens=TOKENS),
    "2 layers dropped": Recipe(drop_layers=2, tokens=TOKENS),
    "1/4 of channels cut": Recipe(prune_ffn=0.25, tokens=TOKENS),
    "1/2 of channels cut": Recipe(prune_ffn=0.5, tokens=TOKENS),
    "1 layer, 1/4, int4": Recipe("int4", drop_layers=1, prune_ffn=0.25, tokens=TOKENS),
}


def calibration_text(examples: Path, path: Path) -> Path:
    """Write conversations of the kind that the demo model was trained on."""
    command = [sys.executable, str(examples / "demo_text.py"), "--count", "2000", "--seed", "7"]
    with path.open("w") as file:
        subprocess.run([*command, "--jsonl"], check=True, stdout=file)
    return path


def exact_match(examples: Path, model: Path) -> float:
    """Share of the held-out questions that a checkpoint answers right."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, str(examples / "evaluate_demo_model.py"), "--model", str(model)]
        subprocess.run(
            [*command, "--json", file.name], check=True, stdout=subprocess.PIPE, stderr=sys.stderr
        )
        return float(json.loads(Path(file.name).read_text())["exact_match"])


def measure(examples: Path) -> list[dict[str, Any]]:
    """A record for the model as it is, and for each recipe."""
    model = examples / "demo_model"
    records = [{"name": "bf16", "exact_match": exact_match(examples, model)}]
    with tempfile.TemporaryDirectory() as folder:
        text = calibration_text(examples, Path(folder) / "chats.jsonl")
        for number, (name, recipe) in enumerate(RECIPES.items()):
            out = Path(folder) / str(number)
            report = msgspec.to_builtins(compress(Job(str(model), out, recipe, text)))
            records.append({"name": name, "exact_match": exact_match(examples, out)} | report)
    return records


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    lines = ["| | weights, MB | logit KL | same best token | perplexity | right answers |"]
    lines.append("|---|---|---|---|---|---|")
    first = msgspec.convert(
        {k: v for k, v in records[1].items() if k in Report.__struct_fields__}, Report
    )
    assert first.quality is not None
    lines.append(
        f"| bf16 | {first.bytes[0] / 1e6:.2f} | | | {first.quality.perplexity[0]:.4f} "
        f"| {records[0]['exact_match']:.1%} |"
    )
    for record in records[1:]:
        found = record["quality"]
        lines.append(
            f"| {record['name']} | {record['bytes'][1] / 1e6:.2f} | {found['kl']:.4f} "
            f"| {found['agreement']:.1%} | {found['perplexity'][1]:.4f} "
            f"| {record['exact_match']:.1%} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description="Quality of the compressed demo model.")
    parser.add_argument("--examples", type=Path, default=Path("examples"), help="that folder")
    parser.add_argument("--output", type=Path, help="write the records to this JSON file")
    arguments = parser.parse_args()
    records = measure(arguments.examples)
    print(table(records))
    if arguments.output:
        document = {"machine": machine(), "versions": versions(), "records": records}
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
