"""Real servers: `vllm serve MODEL --plugins scalellm` end to end."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.server

DEMO_MODEL = Path(__file__).parents[1] / "examples" / "demo_model"
QUIET = ("--enforce-eager", "--max-model-len", "1024", "--served-model-name", "demo")


def _chat(text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 40, **more}


def _sorted_titles(server: Any) -> list[str]:
    return sorted(title for title in server.processes().values() if title.startswith("VLLM"))


def test_a_newcomer_chats_with_the_demo_model(demo_server: Any) -> None:
    answer = demo_server.post("/v1/chat/completions", _chat("What is 2 + 3?"))
    assert "5" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_stream_says_the_same_as_a_whole_answer(demo_server: Any) -> None:
    whole = demo_server.post("/v1/chat/completions", _chat("What is the capital of France?"))
    body = _chat("What is the capital of France?", stream=True)
    with demo_server.open("/v1/chat/completions", body) as response:
        lines = [line.removeprefix(b"data: ") for line in response.read().split(b"\n\n") if line]
    assert lines[-1] == b"[DONE]"
    chunks = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1]]
    assert "".join(chunks) == whole["choices"][0]["message"]["content"]
    assert "Paris" in "".join(chunks)


def test_the_server_says_which_features_are_on(demo_server: Any) -> None:
    reported = demo_server.get("/scalellm/features")
    rows = {row["name"]: row for row in reported["features"]}
    assert rows["status"]["on"] is True
    assert rows["sim"]["on"] is False
    table = demo_server.log.read_text().partition("ScaleLLM plugins")[2]
    assert table, "the start-up table is missing from the log"
    assert table.count("ScaleLLM plugins") == 0, "the table is printed once"
    for name, row in rows.items():
        assert f"{name}" in table
        assert row["why"] in table


def test_every_route_of_vllm_is_still_there(demo_server: Any) -> None:
    assert demo_server.get("/v1/models")["data"][0]["id"] == "demo"
    paths = demo_server.get("/openapi.json")["paths"]
    assert {"/v1/completions", "/v1/responses", "/tokenize", "/scalellm/features"} <= set(paths)


def test_every_process_loads_every_plugin_that_was_named(
    serve: Any, probe_plugins: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    """VLLM_PLUGINS named one plugin, a YAML list names two more; with two API servers."""
    environment = probe_plugins(
        probe_env="def register():\n    note()\n", probe_cli="def register():\n    note()\n"
    )
    options = tmp_path / "serve.yaml"
    options.write_text(
        "plugins: [scalellm, probe_cli]\nscalellm:\n  strict: true\n  frontend: {workers: 2}\n"
    )
    server = serve(
        DEMO_MODEL, "--config", str(options), *QUIET, VLLM_PLUGINS="probe_env", **environment
    )
    assert server.get("/scalellm/features")["features"]
    processes = server.processes()
    titled = {pid: title for pid, title in processes.items() if title.startswith("VLLM")}
    # Two API servers, the engine and its worker.
    assert len([title for title in titled.values() if "APIServer" in title]) == 2, titled
    assert any("EngineCore" in title for title in titled.values()), titled
    assert any("Worker" in title for title in titled.values()), titled
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    for plugin in ("probe_env", "probe_cli"):
        loaded = {int(pid) for name, pid in notes if name == plugin}
        assert {*titled, server.pid} <= loaded, f"{plugin} is missing in a process"


_BREAK = """
def register():
    # What a release of vLLM that moved a seam would look like.
    from scalellm_plugins.patches import registry
    from scalellm_plugins.patches.contracts import Target
    gone = Target(module="vllm.plugins", qualname="gone_in_this_release")
    seam = registry.Seam(name="gone", feature="status", targets=(gone,), why="a test")
    if seam not in registry.SEAMS:
        registry.SEAMS += (seam,)
"""


def test_a_simulated_gpu_serves_and_a_broken_contract_only_costs_its_feature(
    serve: Any, probe_plugins: Callable[..., dict[str, str]]
) -> None:
    server = serve(
        DEMO_MODEL,
        *("--plugins", "scalellm,scalellm.sim", "--scalellm.sim.gpu", "h100", *QUIET),
        **probe_plugins(breaker=_BREAK),
    )
    # As on one CUDA card: the executor lives in the engine's process.
    assert not any("Worker" in title for title in server.processes().values())
    assert any("EngineCore" in title for title in server.processes().values())
    log = server.log.read_text()
    assert "NOTHING IS COMPUTED" in log
    assert "gone_in_this_release" in log
    with pytest.raises(urllib.error.HTTPError, match="404"):
        server.get("/scalellm/features")
    answers = [
        server.post("/v1/chat/completions", _chat("hello", max_tokens=50, ignore_eos=True))
        for _ in range(2)
    ]
    assert {answer["usage"]["completion_tokens"] for answer in answers} == {50}
    texts = {answer["choices"][0]["message"]["content"] for answer in answers}
    assert len(texts) == 1, "the simulator's tokens are deterministic"
