"""Real servers that quantize while they load: the demo model still knows its answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scalellm_plugins.kernels import registry

pytestmark = [pytest.mark.vllm, pytest.mark.server]

DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
QUESTIONS = {f"What is {a} + {b}?": str(a + b) for a in range(1, 6) for b in range(1, 5)}


@pytest.fixture(autouse=True, scope="module")
def ops() -> None:
    registry.load_vllm_ops()
    if why := registry.missing("int4"):
        pytest.skip(why)


def adapter(folder: Path, size: float) -> Path:
    """An adapter of rank 4 for the demo model's o_proj: noise of some size, or nothing."""
    folder.mkdir()
    name = "base_model.model.model.layers.{}.self_attn.o_proj.lora_{}.weight"
    tensors = {}
    for layer in range(5):
        tensors[name.format(layer, "A")] = torch.randn(4, 256)
        tensors[name.format(layer, "B")] = torch.randn(256, 4) * size
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["o_proj"],
        "bias": "none",
        "base_model_name_or_path": str(DEMO),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def ask(server: Any, model: str, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 30}
    answer: str = server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    return answer


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("scalellm_w8a8", (), ["qkv_proj in 8 bits", "down_proj in 8 bits"]),
        (
            "scalellm_int4",
            (
                *("--scalellm.quantization.group_size", "64"),
                *("--scalellm.quantization.keep_8bit", "*.down_proj"),
                *("--scalellm.quantization.skip", "*.layers.0.*.q_proj"),
                *("--scalellm.quantization.lm_head_8bit", "true"),
            ),
            [
                "qkv_proj in 4 bits, groups of 64",
                "qkv_proj in 16 bits (scalellm.quantization.skip)",
                "down_proj in 8 bits (scalellm.quantization.keep_8bit)",
                "lm_head in 8 bits",
            ],
        ),
    ],
)
def test_it_answers(
    serve: Any, tmp_path: Path, method: str, options: tuple[str, ...], said: list[str]
) -> None:
    """With adapters on top: one of nothing changes nothing, one of noise ends all sense.

    (Nearly nothing: other rows in the batch are other sums, and a tie may fall the other way.)
    """
    nothing, noise = adapter(tmp_path / "nothing", 0.0), adapter(tmp_path / "noise", 1.0)
    server = serve(
        DEMO,
        *("--plugins", "scalellm", "--quantization", method, "--served-model-name", "demo"),
        *("--max-model-len", "1024", "--enforce-eager", "--scalellm.strict", *options),
        *("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"),
        *("--lora-modules", f"nothing={nothing}", f"noise={noise}"),
    )
    features = {row["name"]: row["on"] for row in server.get("/scalellm/features")["features"]}
    assert features["quantization"]
    log = server.log.read_text()
    assert all(f"{method}: {line}" in log for line in said), log
    with ThreadPoolExecutor(20) as threads:  # more rows at once than any kernel's few
        answers, same, other = (
            list(threads.map(lambda question, name=model: ask(server, name, question), QUESTIONS))
            for model in ("demo", "nothing", "noise")
        )
    right = [
        expected in answer for expected, answer in zip(QUESTIONS.values(), answers, strict=True)
    ]
    assert sum(right) >= 0.9 * len(right), list(zip(QUESTIONS, answers, strict=True))
    assert sum(one == two for one, two in zip(same, answers, strict=True)) >= 0.9 * len(right)
    assert sum(one == two for one, two in zip(other, answers, strict=True)) < len(right) / 2


def test_two_ranks_share_the_layers(serve: Any) -> None:
    """A rank rounds its own share: o_proj and down_proj, cut along K, by groups of their own.

    Cores are given to the ranks by hand: by itself vLLM wants a NUMA node for each.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two ranks need two cores")
    server = serve(
        DEMO,
        *(
            "--plugins",
            "scalellm",
            "--quantization",
            "scalellm_int4",
            "--served-model-name",
            "demo",
        ),
        *("--max-model-len", "1024", "--enforce-eager", "--scalellm.strict"),
        *("--tensor-parallel-size", "2", "--scalellm.quantization.keep_8bit", "*.o_proj"),
        VLLM_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[1]}",
        VLLM_CPU_KVCACHE_SPACE="1",
    )
    log = server.log.read_text()
    for rank in range(2):
        said = re.findall(rf"Worker_TP{rank} .* scalellm_int4: (\w+ in . bits)", log)
        assert {"o_proj in 8 bits", "down_proj in 4 bits"} <= set(said), log
    answers = [ask(server, "demo", question) for question in QUESTIONS]
    right = [
        expected in answer for expected, answer in zip(QUESTIONS.values(), answers, strict=True)
    ]
    assert sum(right) >= 0.9 * len(right), list(zip(QUESTIONS, answers, strict=True))


def test_a_misspelt_pattern_is_the_end_of_the_start(tmp_path: Path) -> None:
    """Said by the process that has the model; the server neither serves nor stays."""
    log = tmp_path / "log"
    line = ["--quantization", "scalellm_int4", "--scalellm.quantization.skip", "*.down_porj"]
    vllm = Path(sys.executable).parent / "vllm"
    with log.open("wb") as output:
        ended = subprocess.run(
            [vllm, "serve", DEMO, "--plugins", "scalellm", "--enforce-eager", *line],
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
    assert ended.returncode, log.read_text()
    said = r"ConfigError: scalellm\.quantization\.skip: '\*\.down_porj' .* mean '\*\.down_proj'\?"
    assert re.search(said, log.read_text()), log.read_text()
