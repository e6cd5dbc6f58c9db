"""Small checkpoints for the tests of `scalellm compress`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from scalellm_plugins import cli

DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
INDEX = "model.safetensors.index.json"

TEXT = [
    {"messages": [
        {"role": "user", "content": f"What is {a} + {b}?"},
        {"role": "assistant", "content": f"{a} + {b} = {a + b}."},
    ]}
    for a in range(1, 9) for b in range(1, 9)
]  # fmt: skip


def compress(*arguments: object) -> int:
    return cli.main(["compress", *map(str, arguments)])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert compress(*arguments) == 2
    return capsys.readouterr().err


def copy_of_demo(folder: Path) -> Path:
    """The demo model, to be damaged."""
    shutil.copytree(DEMO, folder)
    return folder


def sharded_demo(folder: Path, count: int) -> Path:
    """The demo model in `count` shards; neighbours in a layer are in different ones."""
    copy_of_demo(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    placed = {tensor: names[i % count] for i, tensor in enumerate(sorted(tensors))}
    for shard in names:
        chosen = {t: tensors[t] for t, where in placed.items() if where == shard}
        save_file(chosen, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def tiny(folder: Path, kind: str, **options: Any) -> Path:
    """A random model of an architecture: 3 layers, 128 wide, 256 channels."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 2048,  # the demo tokenizer's
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(sizes | options))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder)
    return folder


def write_text(path: Path) -> Path:
    """Calibration text: sums, as conversations."""
    path.write_text("".join(json.dumps(document) + "\n" for document in TEXT))
    return path
