"""`scalellm compress --method`: llm-compressor's recipes.

llm-compressor cannot be installed beside vLLM, so what it does is tested only where
SCALELLM_CALIBRATED_PYTHON names the Python of an environment that has it and this package. What is
refused, and how, is tested everywhere.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from scalellm_plugins import cli
from scalellm_plugins.compression import recipe
from scalellm_plugins.compression.recipe import Recipe
from scalellm_plugins.errors import ConfigError

from .compression_parts import DEMO, write_text
from .conftest import ServeFunction

ELSEWHERE = os.environ.get("SCALELLM_CALIBRATED_PYTHON", "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "gptq", "text": "x"}, "goes with --scheme int4 or int8 or w8a8; none was"),
        ({"method": "awq", "scheme": "w8a8", "text": "x"}, "goes with --scheme int4 or int8;"),
        ({"method": "sparsegpt", "scheme": "int4", "text": "x"}, "goes with no --scheme; --scheme"),
        ({"method": "gptq", "scheme": "int4"}, "give --calibration FILE"),
        ({"method": "gptq", "scheme": "int4", "text": "x", "drop_layers": 1}, "are two runs"),
        ({"method": "sparsegpt", "text": "x", "prune_ffn": 0.5}, "are two runs"),
    ],
)
def test_what_does_not_go_together(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe.check(Recipe(**options))  # type: ignore[arg-type]


def test_what_goes_together() -> None:
    gptq = recipe.check(Recipe(method="gptq", scheme="w8a8", text="x"))
    assert gptq.group_size == recipe.CHANNEL
    assert recipe.check(Recipe(method="sparsegpt", text="x", ignore=("*.o_proj",))).ignore


def test_beside_vllm_it_says_where_to_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = write_text(tmp_path / "text.jsonl"), tmp_path / "out"
    command = ["compress", str(DEMO), str(out), "--scheme", "int4", "--method", "gptq"]
    assert cli.main([*command, "--calibration", str(text)]) == 2
    said = capsys.readouterr().err
    assert "In an environment of its own, without vLLM: pip install '.[calibrated]' in" in said
    assert not list(tmp_path.glob("out*"))


@pytest.mark.server
@pytest.mark.skipif(not ELSEWHERE, reason="SCALELLM_CALIBRATED_PYTHON: see the module")
@pytest.mark.parametrize("options", [("--scheme", "int4", "--method", "gptq")])
def test_plain_vllm_serves_it(
    serve: ServeFunction, tmp_path: Path, options: tuple[str, ...]
) -> None:
    text, out = write_text(tmp_path / "text.jsonl"), tmp_path / "out"
    command = [ELSEWHERE, "-m", "scalellm_plugins.cli", "compress", str(DEMO), str(out), *options]
    subprocess.run([*command, "--calibration", str(text)], check=True)
    server = serve(out, "--enforce-eager", "--max-model-len", "2048", "--served-model-name", "demo")
    assert "CPUWNA16LinearKernel" in server.log.read_text()
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": "demo", "messages": messages, "temperature": 0}
    reply = server.post("/v1/chat/completions", body)
    assert reply["choices"][0]["message"]["content"].strip() == "The capital of France is Paris."
