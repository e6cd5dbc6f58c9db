"""A compressed checkpoint on plain vLLM: no `--plugins`, and it still knows its answers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from scalellm_plugins import cli

from .compression_parts import DEMO
from .conftest import ServeFunction

QUESTIONS = {
    "What is 2 + 3?": "2 + 3 = 5.",
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the opposite of hot?": "The opposite of hot is cold.",
}


OURS = ("--plugins", "scalellm", "--scalellm.strict")


@pytest.mark.server
@pytest.mark.parametrize(
    ("options", "plugins", "kernel"),
    [
        (("int4",), (), "CPUWNA16LinearKernel"),
        (("w8a8",), (), "CPUInt8ScaledMMLinearKernel"),
        (("int4", "--asymmetric"), OURS, "ScaleLLMLinearKernel"),
        (("int8",), OURS, "ScaleLLMLinearKernel"),
    ],
)
def test_it_is_served(
    serve: ServeFunction,
    tmp_path: Path,
    options: tuple[str, ...],
    plugins: tuple[str, ...],
    kernel: str,
) -> None:
    """By plain vLLM, save for W8A16, for which its CPU backend has no kernel; and with ours."""
    out = tmp_path / "out"
    assert cli.main(["compress", str(DEMO), str(out), "--scheme", *options]) == 0
    server = serve(
        out,
        *("--enforce-eager", "--max-model-len", "2048", "--served-model-name", "demo"),
        *plugins,
    )
    assert kernel in server.log.read_text()
    for question, answer in QUESTIONS.items():
        messages = [{"role": "user", "content": question}]
        body = {"model": "demo", "messages": messages, "temperature": 0}
        reply = server.post("/v1/chat/completions", body)
        assert reply["choices"][0]["message"]["content"].strip() == answer
