"""From names and options to a decision, without vLLM."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType

import pytest

from scalellm_plugins import activation, arguments, config, decision, names, plugin
from scalellm_plugins.errors import ConfigError, ContractError, UnknownPluginError
from scalellm_plugins.features import FEATURES

HOLDS: dict[str, list[str]] = {}


@pytest.fixture(autouse=True)
def environment(
    clean_environment: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.MonkeyPatch]:
    """No contract is broken and no patch is applied: those have tests of their own."""
    monkeypatch.setattr(decision, "contract_reasons", lambda name: HOLDS.get(name, []))
    monkeypatch.setattr(activation, "apply_patches", lambda *_args, **_kwargs: [])
    monkeypatch.setattr(names, "_loaded", set())
    # As before vLLM sets up its logging, which tests before these may have had it do.
    logger = logging.getLogger("vllm")
    level = logger.level
    logger.setLevel(logging.WARNING)
    yield clean_environment
    logger.setLevel(level)


def on(states: tuple[decision.FeatureState, ...]) -> set[str]:
    return {state.name for state in states if state.on}


def run(line: list[str], options: dict[str, object] | None = None) -> argparse.Namespace:
    arguments = argparse.Namespace(api_server_count=None)
    activation.from_command_line(line, options or {}, arguments)
    return arguments


def test_everything_safe_is_everything_built_but_the_simulator() -> None:
    expected = {f.name for f in FEATURES.values() if f.default and f.status != "planned"}
    assert on(decision.decide(["scalellm"], config.Config())) == expected
    assert "sim" not in expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, ["cannot be read", "No such file"]),
        ("- name: acme\n  keys: [", ["is not YAML", "line 2 column 10"]),
        ("- name: acme\n  max_request: 3", ["tenant 1 ('acme')", "'max_request'", "max_requests"]),
    ],
)
def test_a_tenants_file_that_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path, text: str | None, said: list[str]
) -> None:
    """By the first process: the model takes a minute to load, and more to restart."""
    file = tmp_path / "tenants.yaml"
    if text is not None:
        file.write_text(text)
    options: dict[str, object] = {"frontend": {"tenants": str(file)}}
    with pytest.raises(ConfigError) as error:
        run(["scalellm"], options)
    for part in ["scalellm.frontend.tenants", str(file), *said]:
        assert part in str(error.value)
    assert config.state_from_env() is None, "nothing is decided for other processes"
    # Who turned the frontend off has no use for the file.
    run(["scalellm"], config.merge(options, {"frontend": {"enabled": "off"}}))
    file.write_text("[{name: acme}]")
    run(["scalellm"], options)


@pytest.mark.parametrize(
    ("line", "options", "method", "said"),
    [
        (["scalellm"], {"quantization": "off"}, "scalellm_int4", "--scalellm.quantization on"),
        (["scalellm.ipc"], {}, "scalellm_int4", r"off \(not asked for\)\. Switch it on"),
        (["other"], {}, "scalellm_w8a8", "Add --plugins scalellm"),
        (["scalellm"], {"enabled": "off"}, "scalellm_int8", "Drop --scalellm off"),
        (["scalellm"], {"quantization": {"keep_8bit": "*"}}, "scalellm_int8", "has no effect with"),
        (["scalellm"], {"quantization": {"skip": "*"}}, None, "has no effect without"),
    ],
)
def test_a_method_that_cannot_be_or_an_option_for_nothing_ends_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
    line: list[str],
    options: dict[str, object],
    method: str | None,
    said: str,
) -> None:
    monkeypatch.setattr(names, "known_names", lambda: {"scalellm", "scalellm.ipc", "other"})
    arguments = argparse.Namespace(api_server_count=None, quantization=method)
    with pytest.raises(ConfigError, match=said):
        activation.from_command_line(line, options, arguments)
    assert config.state_from_env() is None, "nothing is decided for other processes"


def test_a_method_of_a_feature_that_this_vllm_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HOLDS, "quantization", ["module X is gone"])
    arguments = argparse.Namespace(api_server_count=None, quantization="scalellm_int4")
    with pytest.raises(ConfigError, match=r"off \(module X is gone\)\. Drop --quantization"):
        activation.from_command_line(["scalellm"], {}, arguments)


def test_options_of_quantization_where_they_act(environment: pytest.MonkeyPatch) -> None:
    arguments = argparse.Namespace(api_server_count=None, quantization="scalellm_int4")
    options = {"quantization": {"keep_8bit": "*.o_proj"}}
    activation.from_command_line(["scalellm"], options, arguments)
    activation.from_command_line(["scalellm"], {}, arguments)  # as after a restart
    assert config.current().quantization.keep_8bit == "*.o_proj"


def test_a_feature_is_picked_by_name() -> None:
    assert on(decision.decide(["scalellm.status"], config.Config())) == {"status"}


@pytest.mark.parametrize(
    ("picked", "options", "expected"),
    [
        (["scalellm"], {"status": "off"}, {"frontend", "ipc", "quantization", "scheduler"}),
        (["scalellm"], {"ipc": "off"}, {"frontend", "quantization", "scheduler", "status"}),
        (["scalellm.frontend"], {"status": "on"}, {"frontend", "status"}),
        (["scalellm.frontend"], {"frontend": "off"}, set()),
        (["scalellm"], {"enabled": "off"}, set()),
        (
            ["scalellm"],
            {"sim": {"enabled": "on"}},
            {"frontend", "ipc", "quantization", "scheduler", "status", "sim"},
        ),
    ],
)
def test_a_switch_beats_a_name(
    picked: list[str], options: dict[str, object], expected: set[str]
) -> None:
    assert on(decision.decide(picked, config.parse(options))) == expected


def test_a_broken_contract_turns_its_feature_off_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(HOLDS, "status", ["module X is gone"])
    states = {state.name: state for state in decision.decide(["scalellm"], config.Config())}
    assert not states["status"].on
    assert "module X is gone" in states["status"].why
    assert states["frontend"].on


def test_strict_refuses_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = config.parse({"strict": "on"})
    planned = replace(FEATURES["quantization"], status="planned")
    monkeypatch.setitem(FEATURES, "quantization", planned)
    decision.decide(["scalellm"], strict)  # planned features that nobody named do not count
    with pytest.raises(ContractError, match="quantization: planned"):
        decision.decide(["scalellm", "scalellm.quantization"], strict)
    monkeypatch.setitem(HOLDS, "status", ["module X is gone"])
    with pytest.raises(ContractError, match="module X is gone"):
        decision.decide(["scalellm"], strict)


def test_the_decision_travels_and_is_not_taken_twice() -> None:
    run(["scalellm"], {"status": "off"})
    assert not activation.is_due()
    assert on(activation.states()) == {"frontend", "ipc", "quantization", "scheduler"}
    before = dict(os.environ)
    activation.from_environment()  # what a child process does
    assert dict(os.environ) == before
    assert config.current().status.enabled is False


def test_unset_vllm_plugins_keeps_allowing_every_other_plugin() -> None:
    run(["scalellm.status"])
    allowed = os.environ["VLLM_PLUGINS"].split(",")
    assert "scalellm.status" in allowed
    assert names.discovered() - set(allowed) <= {
        "lora_hf_hub_resolver",  # being named is consent to remote downloads
        *(name for name in names.discovered() if name.startswith("scalellm")),
    }
    assert not any(names.is_ours(name) for name in allowed if name != "scalellm.status")


def test_set_vllm_plugins_is_extended(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    run(["scalellm.status"])
    assert os.environ["VLLM_PLUGINS"].split(",") == ["lora_filesystem_resolver", "scalellm.status"]


def _install(monkeypatch: pytest.MonkeyPatch, points: list[tuple[str, str]]) -> None:
    found = EntryPoints(EntryPoint(name, "builtins:print", group) for group, name in points)

    def select(group: str) -> EntryPoints:
        return found.select(group=group)

    monkeypatch.setattr(names, "entry_points", select)


def test_other_plugins_routes_are_not_opened_behind_their_owners_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM loads routes only of plugins that VLLM_PLUGINS names; unset, nobody named them."""
    _install(monkeypatch, [(names.GENERAL, "foo"), (names.ENDPOINT, "foo"), (names.GENERAL, "bar")])
    run(["scalellm.frontend"])
    assert os.environ["VLLM_PLUGINS"].split(",") == ["scalellm.frontend", "bar"]
    assert activation.general_only() == ["foo"]
    run(["scalellm.frontend"])  # as after a restart: VLLM_PLUGINS is set now
    assert activation.general_only() == ["foo"]


def test_other_plugins_can_be_named_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, [(names.GENERAL, "foo"), (names.ENDPOINT, "foo"), (names.GENERAL, "bar")])
    run(["foo"])
    assert os.environ["VLLM_PLUGINS"].split(",") == ["foo", "bar"]
    assert activation.states() == ()


def test_a_plugin_named_late_is_loaded_here_too(
    monkeypatch: pytest.MonkeyPatch,
    environment: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment.setenv("VLLM_PLUGINS", "bar")
    _install(monkeypatch, [(names.GENERAL, "foo"), (names.GENERAL, "bar")])
    run(["foo"])
    assert capsys.readouterr().out == "\n"  # the plugin is print(), called once


def test_workers_become_api_servers_and_contradictions_are_refused() -> None:
    assert run(["scalellm"], {"frontend": {"workers": 3}}).api_server_count == 3
    assert run(["scalellm"]).api_server_count == 3  # from SCALELLM_CONFIG
    arguments = argparse.Namespace(api_server_count=2)
    with pytest.raises(ConfigError, match="--api-server-count 2"):
        activation.from_command_line(["scalellm"], {}, arguments)


@pytest.mark.parametrize(
    ("arguments", "cores", "count", "bounds"),
    [
        ({}, 2, None, (1, 1)),  # vLLM's own single process
        ({}, 16, 4, (1, 4)),
        ({"data_parallel_size": 6}, 2, 6, (1, 6)),
        ({"data_parallel_size": 6, "data_parallel_rank": 1}, 64, None, (1, 1)),
        ({"data_parallel_size": 6, "data_parallel_external_lb": True}, 64, None, (1, 1)),
        (
            {"data_parallel_size": 6, "data_parallel_size_local": 3, "data_parallel_hybrid_lb": 1},
            *(2, 3, (1, 3)),
        ),
        ({"api_server_count": 2}, 64, 2, (2, 2)),
    ],
)
def test_the_number_of_workers_is_decided_once_for_every_process(
    environment: pytest.MonkeyPatch,
    arguments: dict[str, object],
    cores: int,
    count: int | None,
    bounds: tuple[int, int],
) -> None:
    environment.setattr("os.sched_getaffinity", lambda _pid: range(cores))
    line = argparse.Namespace(**{"api_server_count": None, **arguments})
    activation.from_command_line(["scalellm"], {}, line)
    assert line.api_server_count == count
    frontend = config.current().frontend
    assert (frontend.min_workers, frontend.max_workers) == bounds
    before = dict(os.environ)
    activation.from_command_line(["scalellm"], {}, line)  # as after a restart
    assert dict(os.environ) == before


def test_one_worker_is_one_where_vllm_would_start_one_per_rank() -> None:
    line = argparse.Namespace(api_server_count=None, data_parallel_size=2)
    activation.from_command_line(["scalellm"], {"frontend": {"workers": 1}}, line)
    assert line.api_server_count == 1


def test_switched_off_it_leaves_vllms_arguments_alone() -> None:
    arguments = run(["scalellm"], {"frontend": {"workers": 3, "enabled": "off"}})
    assert arguments.api_server_count is None


def test_a_wrong_name_in_the_variable_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("VLLM_PLUGINS", "scalellm,scalellm.icp")
    with pytest.raises(UnknownPluginError, match=r"VLLM_PLUGINS: .*'scalellm.icp'.*scalellm.ipc"):
        activation.from_environment()


@pytest.mark.parametrize(
    ("variable", "options", "expected"),
    [
        (None, "", False),
        ("scalellm", "", False),
        ("scalellm.sim", "", True),
        ("scalellm.sim", '{"sim": "off"}', False),
        ("scalellm", '{"sim": "on"}', True),
    ],
)
def test_the_simulated_platform_waits_to_be_asked(
    environment: pytest.MonkeyPatch, variable: str | None, options: str, expected: bool
) -> None:
    if variable:
        environment.setenv("VLLM_PLUGINS", variable)
    environment.setenv("SCALELLM_CONFIG", options)
    assert (plugin.simulated_platform() is not None) is expected


@pytest.mark.parametrize(
    ("variable", "argv", "expected"),
    [
        (None, ["vllm", "serve", "M", "--plugins", "scalellm"], None),
        ("foo", ["/x/vllm", "serve", "M", "--plugins", "scalellm"], "foo,scalellm.cli"),
        ("foo", ["/x/vllm", "serve", "M", "--config", "c.yaml"], "foo,scalellm.cli"),
        ("foo", ["/x/vllm", "serve", "M"], "foo"),
        ("foo", ["/x/train.py", "--plugins", "scalellm"], "foo"),
        ("foo,scalellm", ["vllm", "serve", "M", "--plugins", "scalellm"], "foo,scalellm"),
        ("", ["vllm", "serve", "M", "--scalellm.ipc", "off"], "scalellm.cli"),
        # vLLM strips no spaces, and says nothing of names that match nothing.
        ("foo, scalellm", ["/x/train.py"], "foo,scalellm"),
        ("scalellm.icp", ["/x/train.py"], "scalellm.icp,scalellm.cli"),
        ("my_scalellm_fork", ["/x/vllm", "--plugins", "x"], "my_scalellm_fork,scalellm.cli"),
    ],
)
def test_options_stay_alive_under_a_foreign_allowlist(
    environment: pytest.MonkeyPatch, variable: str | None, argv: list[str], expected: str | None
) -> None:
    if variable is not None:
        environment.setenv("VLLM_PLUGINS", variable)
    environment.setattr("sys.argv", argv)
    plugin.keep_options()
    assert os.environ.get("VLLM_PLUGINS") == expected


def test_the_table_is_short_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = replace(FEATURES["quantization"], status="planned")
    monkeypatch.setitem(FEATURES, "quantization", planned)
    text = decision.table(decision.decide(["scalellm.quantization"], config.Config()))
    assert len(text.splitlines()) == len(FEATURES) + 2
    assert "planned: not in version" in text


def test_a_module_of_vllm_is_a_command_of_vllm(environment: pytest.MonkeyPatch) -> None:
    environment.setattr("sys.argv", ["-m", "M", "--plugins", "scalellm"])
    environment.setattr(
        "sys.orig_argv", ["python", "-u", "-m", "vllm.entrypoints.openai.api_server"]
    )
    assert names.is_vllm_command()
    environment.setattr("sys.orig_argv", ["python", "-m", "pytest"])
    assert not names.is_vllm_command()


def test_a_decision_of_another_server_is_not_ours(environment: pytest.MonkeyPatch) -> None:
    """A program that ran vLLM in its own process leaves its decision to whatever it starts."""
    environment.setenv("VLLM_PLUGINS", "scalellm")
    activation.from_environment()
    assert activation.states()
    environment.setenv("SCALELLM_CONFIG", '{"status": "off"}')
    assert activation.states() == ()
    assert activation.is_due()
    environment.delenv("VLLM_PLUGINS")
    assert plugin.simulated_platform() is None


def test_the_simulated_gpu_needs_a_name_of_ours(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SCALELLM_CONFIG", '{"sim": "on"}')
    assert plugin.simulated_platform() is None


@pytest.mark.parametrize(
    ("command", "attributes", "expected"),
    [
        ("serve", {}, {"status", "frontend", "ipc", "quantization", "scheduler"}),
        ("", {}, {"status", "ipc", "quantization", "scheduler"}),
        ("run-batch", {}, {"quantization", "scheduler"}),
        ("bench throughput", {}, {"quantization", "scheduler"}),
        ("serve", {"headless": True}, {"quantization", "scheduler"}),
        (
            "serve",
            {"data_parallel_multi_port_external_lb": True},
            {"status", "ipc", "quantization", "scheduler"},
        ),
        ("serve", {"grpc": True}, {"status", "ipc", "quantization", "scheduler"}),
    ],
)
def test_features_of_the_http_side_need_one(
    command: str, attributes: dict[str, object], expected: set[str]
) -> None:
    arguments = argparse.Namespace(api_server_count=None, **attributes)
    options = {"frontend": {"workers": 3}, "strict": True}
    activation.from_command_line(["scalellm"], options, arguments, command)
    assert on(activation.states()) == expected
    assert arguments.api_server_count == (3 if "frontend" in expected else None)


def test_in_a_library_there_is_no_http_side(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("VLLM_PLUGINS", "scalellm")
    activation.from_environment()
    rows = {state.name: state for state in activation.states()}
    assert not rows["status"].on
    assert "library" in rows["status"].why


def test_a_platform_chosen_too_early_is_said_and_refused_under_strict(
    environment: pytest.MonkeyPatch,
) -> None:
    platforms = ModuleType("vllm.platforms")
    platforms._current_platform = object()  # type: ignore[attr-defined]
    environment.setitem(sys.modules, "vllm.platforms", platforms)
    environment.setenv("VLLM_PLUGINS", "scalellm.sim")
    activation.from_environment()
    assert not activation.is_on("sim")
    environment.setenv("SCALELLM_CONFIG", '{"strict": true}')
    with pytest.raises(ContractError, match="before importing vllm"):
        activation.from_environment()


def test_a_restart_is_only_for_vllms_own_process(environment: pytest.MonkeyPatch) -> None:
    """A notebook that parses vLLM's arguments is not replaced by a new process."""
    platforms = ModuleType("vllm.platforms")
    platforms._current_platform = object()  # type: ignore[attr-defined]
    environment.setitem(sys.modules, "vllm.platforms", platforms)
    environment.setattr("os.execv", lambda *_: pytest.fail("replaced the process"))
    with pytest.raises(ConfigError, match="Set VLLM_PLUGINS="):
        run(["scalellm.sim"])
    environment.setenv("VLLM_TARGET_DEVICE", "cpu")
    with pytest.raises(ConfigError, match="VLLM_TARGET_DEVICE"):
        run(["scalellm.sim"])


def test_the_decision_reaches_other_machines(environment: pytest.MonkeyPatch) -> None:
    """vLLM copies variables to Ray actors by prefix."""
    environment.setenv("VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "MY_")
    run(["scalellm"])
    run(["scalellm"])
    assert os.environ["VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"] == "MY_,SCALELLM_"


def test_a_line_that_cannot_know_our_options_loses_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = [
        "vllm",
        "serve",
        "M",
        "--plugins",
        "scalellm",
        "--port",
        "1",
        "--scalellm.ipc",
        "off",
        "--scalellm={}",
        "-q",
    ]
    arguments.withdraw(line, "EngineArgs.add_cli_args is gone")
    assert line == ["vllm", "serve", "M", "--port", "1", "-q"]
    assert "EngineArgs.add_cli_args is gone" in capsys.readouterr().err
    untouched = ["vllm", "serve", "M"]
    arguments.withdraw(untouched, "x")
    assert untouched == ["vllm", "serve", "M"]
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match=r"scalellm\.strict"):
        arguments.withdraw(["vllm", "--plugins", "scalellm", "--scalellm.strict"], "x")


def test_a_vllm_without_room_for_our_options_serves_without_us(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The patch of the command line cannot be applied: the line must still parse."""
    environment.setattr(plugin, "_building_command_line", lambda: True)
    environment.setattr(activation, "apply_patches", lambda *_args, **_kwargs: ["it moved"])
    environment.setattr("sys.argv", ["vllm", "serve", "M", "--plugins", "scalellm"])
    plugin.register()
    assert sys.argv == ["vllm", "serve", "M"]
    assert "it moved" in capsys.readouterr().err
    assert activation.states() == ()


def test_while_the_command_line_is_built_nothing_is_decided(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("VLLM_PLUGINS", "scalellm")
    environment.setattr(plugin, "_building_command_line", lambda: True)
    plugin.register()
    assert activation.states() == ()
    environment.setattr(plugin, "_building_command_line", lambda: False)
    plugin.register()
    assert activation.states()


def test_what_vllm_no_longer_loads_is_loaded_once_in_a_child(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _install(environment, [(names.GENERAL, "foo"), (names.ENDPOINT, "foo")])
    run(["scalellm.frontend"])
    for _ in range(3):  # vLLM calls it once per name of ours
        plugin.register()
    assert capsys.readouterr().out == "\n"  # the plugin is print()
