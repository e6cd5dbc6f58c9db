"""The command line of `scalellm bench compare`: what it means, and what its errors say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from scalellm_plugins.benchmarks import compare, systems
from scalellm_plugins.benchmarks.options import Plan, parse
from scalellm_plugins.benchmarks.session import turns
from scalellm_plugins.benchmarks.systems import BUILT_IN, Target, choose, define
from scalellm_plugins.errors import ConfigError


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    path = tmp_path / "vllm-rs"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def names(plan: Plan) -> list[str]:
    return [system.name for system in plan.systems]


def test_defaults(binary: Path) -> None:
    plan = parse(["--vllm-rs", str(binary)])
    assert names(plan) == ["vllm", "vllm-x2", "vllm-rs", "scalellm"]
    assert [(c.workload.name, c.stream, c.streams) for c in plan.cells] == [
        ("short", stream, streams) for stream in (True, False) for streams in (16, 64, 256)
    ]
    assert (plan.rounds, plan.seconds, plan.gpu, plan.preset) == (3, 8.0, "h200", "8b")
    assert plan.load_generator == "own"


def test_quick_is_short_and_options_win() -> None:
    plan = parse(["--quick", "--streams", "4"])
    assert (len(plan.cells), plan.rounds, plan.seconds) == (1, 1, 4.0)
    assert plan.cells[0].streams == 4


def test_without_vllm_rs_it_is_left_out_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    plan = parse(["--systems", "vllm,vllm-rs"])
    assert names(plan) == ["vllm"]
    assert "--vllm-rs PATH" in plan.skipped["vllm-rs"]


def test_picture_goes_beside_the_output(tmp_path: Path) -> None:
    plan = parse(["--output", str(tmp_path / "a.json")])
    assert plan.plot == tmp_path / "a.png"
    assert parse([]).plot is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--systems", "vlm"], "--systems: 'vlm' is unknown. Valid: vllm,"),
        (["--systems", "vllm,vllm"], "--systems: 'vllm' is given twice"),
        (["--systems", ""], "--systems: no system is named"),
        (["--system", "x"], "--system: 'x' is not NAME="),
        (["--system", "x=nope --a"], "--system: x: base 'nope' is unknown. Valid: "),
        (["--system", "x=vllm '"], "Check the quotes"),
        (["--streams", "16,many"], "--streams: 'many' is not a number"),
        (["--streams", "0"], "--streams: '0' is not a number of concurrent users"),
        (["--streams", ","], "--streams: nothing is named"),
        (["--workloads", "shrt"], "--workloads: 'shrt' is unknown. Valid: short"),
        (["--workloads", ","], "--workloads: nothing is named"),
        (["--stream-modes", "both"], "--stream-modes: 'both' is unknown. Valid: stream, nonstream"),
        (["--gpu", "h2000"], "--gpu: 'h2000' is unknown. Valid: h200"),
        (["--gpu", "none"], "--gpu: 'none' serves a real model, so it needs --model-dir"),
        (["--model", "8c"], "--model: '8c' is unknown. Valid: 8b"),
        (["--rounds", "-1"], "--rounds: -1 is too small. Give at least 1"),
        (["--seconds", "0.1"], "--seconds: 0.1 is too small. Give at least 0.5"),
        (["--vllm-rs", "/nowhere"], "--vllm-rs: '/nowhere' is not an executable file"),
        (["--load-generator", "vlm"], "--load-generator: 'vlm' is unknown. Valid: vllm"),
        (["--output", "/nowhere/a.json"], "--output: '/nowhere/a.json' is in a folder that does"),
    ],
)
def test_errors_name_option_value_and_remedy(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(argv)


def test_vllm_rs_generator_without_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="--load-generator: 'vllm-rs' needs its binary"):
        parse(["--load-generator", "vllm-rs"])


def test_main_reports_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([]) == 2
    assert compare.main(["comparr"]) == 2
    assert "'comparr' is unknown" in capsys.readouterr().err
    assert compare.main(["--help"]) == 0
    assert compare.main(["compare", "--streams", "x"]) == 2
    assert "--streams: 'x'" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_main_refuses_loads_that_the_generator_cannot_make(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "vllm_executable", lambda: "vllm")
    argv = ["compare", "--load-generator", "vllm", "--stream-modes", "nonstream"]
    assert compare.main(argv) == 2
    assert "--load-generator: 'vllm' always streams" in capsys.readouterr().err
    argv = ["compare", "--load-generator", "vllm", "--quick", "--workloads", "chat"]
    assert compare.main(argv) == 2
    assert "leads no conversations" in capsys.readouterr().err


def test_help_shows_systems_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in BUILT_IN)
    assert "examples:" in text


# Systems


def test_definitions_build_on_each_other() -> None:
    chosen = choose(
        ["vllm"], ["a=FOO=1 vllm-x2 --x 'y z'", "b=a --plugins p,scalellm.sim --w", "vllm=b"]
    )
    assert [system.name for system in chosen] == ["vllm", "a", "b"]
    first, a, b = chosen
    assert a.args == ("--api-server-count", "2", "--x", "y z")
    assert dict(a.env) == {"FOO": "1"}
    assert b.plugins == ("p",)
    assert b.args == (*a.args, "--w")
    assert (first.plugins, first.args) == (b.plugins, b.args)


def test_what_needs_the_binary_still_does() -> None:
    assert define("mine=vllm-rs --x", BUILT_IN).needs == "--vllm-rs"
    assert define("mine=scalellm --plugins=scalellm.ipc", BUILT_IN).plugins == ("scalellm.ipc",)


def test_command_lines(monkeypatch: pytest.MonkeyPatch, binary: Path) -> None:
    monkeypatch.setattr(systems, "vllm_executable", lambda: "vllm")
    monkeypatch.setenv("VLLM_PLUGINS", "left-over")
    monkeypatch.setenv("SCALELLM_CONFIG", "{}")
    simulated = Target(Path("/m"), "h200", "8b", binary, ("--all", "1"))
    words = systems.command(BUILT_IN["scalellm"], simulated, 81)
    assert words[:3] == ["vllm", "serve", "/m"]
    assert words[words.index("--plugins") + 1] == "scalellm,scalellm.sim"
    assert words[words.index("--scalellm.sim.gpu") + 1] == "h200"
    assert words[words.index("--scalellm.sim.model") + 1] == "8b"
    assert words[-2:] == ["--all", "1"]
    real = Target(Path("/m"), None, None)
    assert "--plugins" not in systems.command(BUILT_IN["vllm"], real, 81)
    env = systems.environment(BUILT_IN["vllm-rs"], simulated)
    assert env["VLLM_RUST_FRONTEND_PATH"] == str(binary)
    assert env["VLLM_USE_RUST_FRONTEND"] == "1"
    assert not {"VLLM_PLUGINS", "SCALELLM_CONFIG"} & env.keys()


def test_no_vllm_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    monkeypatch.setattr("shutil.which", lambda _name: None)
    with pytest.raises(ConfigError, match="Install vLLM"):
        systems.vllm_executable()


def test_rounds_are_interleaved_and_rotate() -> None:
    plan = parse(["--quick", "--systems", "vllm,scalellm", "--streams", "1,2"])
    order = [(n, cell.streams, name) for n, cell, name in turns(plan.systems, plan.cells, 2)]
    assert order == [
        (0, 1, "vllm"),
        (0, 1, "scalellm"),
        (0, 2, "vllm"),
        (0, 2, "scalellm"),
        (1, 1, "scalellm"),
        (1, 1, "vllm"),
        (1, 2, "scalellm"),
        (1, 2, "vllm"),
    ]
