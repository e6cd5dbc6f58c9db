"""`--plugins` and `--scalellm`: the token gymnastics around vLLM's parser, without vLLM."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from scalellm_plugins import activation
from scalellm_plugins.arguments import add_arguments, gather_names, mend_bare_switches

KNOWN = {"scalellm", "scalellm.ipc", "other"}


@pytest.mark.parametrize(
    ("tokens", "typed", "expected"),
    [
        # A single value stays as it is, and the model behind it stays a model.
        (["--plugins", "scalellm", "MODEL"], "all", ["--plugins", "scalellm", "MODEL"]),
        (["MODEL", "--plugins", "scalellm"], "all", ["MODEL", "--plugins", "scalellm"]),
        # Several known names are one value, on the command line and from YAML.
        (["--plugins", "scalellm", "other"], "all", ["--plugins", "scalellm,other"]),
        (["M", "--plugins", "scalellm", "other", "--port", "1"], "M", None),
        # An unknown name that was never typed came from YAML: ours to refuse, not a model.
        (["M", "--plugins", "scalellm", "othre"], "M", ["M", "--plugins", "scalellm,othre"]),
        # Nothing to gather.
        (["M", "--plugins"], "all", ["M", "--plugins"]),
        (["M", "--plugins", "--port", "1"], "all", ["M", "--plugins", "--port", "1"]),
        (["M", "--plugins=scalellm", "x"], "all", ["M", "--plugins=scalellm", "x"]),
    ],
)
def test_names_are_gathered_and_the_model_is_left_alone(
    tokens: list[str], typed: str, expected: list[str] | None
) -> None:
    command_line = tokens if typed == "all" else [typed, "--config", "x.yaml"]
    expected = expected or ["M", "--plugins", "scalellm,other", "--port", "1"]
    assert gather_names(tokens, KNOWN, command_line) == expected


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["--scalellm.strict"], ["--scalellm.strict=on"]),
        (["--scalellm.strict", "--port", "1"], ["--scalellm.strict=on", "--port", "1"]),
        (["--scalellm.ipc", "off"], ["--scalellm.ipc", "off"]),
        (["--scalellm.strict", "MODEL"], ["--scalellm.strict=on", "MODEL"]),
        (["--scalellm.strict", "no", "MODEL"], ["--scalellm.strict", "no", "MODEL"]),
        (["--scalellm.ipc", "maybe"], ["--scalellm.ipc", "maybe"]),
        (["--scalellm.ipc=off", "--port"], ["--scalellm.ipc=off", "--port"]),
        # Not a switch: vLLM's own complaint is the right one.
        (["--scalellm.frontend.workers", "--port"], ["--scalellm.frontend.workers", "--port"]),
        (["--other.strict", "--port"], ["--other.strict", "--port"]),
    ],
)
def test_bare_switches_get_a_value(before: list[str], after: list[str]) -> None:
    mend_bare_switches(before)
    assert before == after


@pytest.fixture
def calls(clean_environment: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, object]]]:
    """What the parser hands to `activation.from_command_line`."""
    seen: list[tuple[list[str], dict[str, object]]] = []
    clean_environment.setattr(
        activation,
        "from_command_line",
        lambda names, options, *_: seen.append((list(names), dict(options))),
    )
    return seen


def test_names_and_options_accumulate(calls: list[tuple[list[str], dict[str, object]]]) -> None:
    parser = add_arguments(argparse.ArgumentParser())
    parser.parse_args(
        [
            *("--plugins", "scalellm.ipc", "--plugins", "scalellm.ipc,other"),
            *("--scalellm", '{"ipc": "off", "sim": {"gpu": "h100"}}'),
            *("--scalellm", '{"sim": {"model": "8b"}}'),
        ]
    )
    assert calls == [
        (
            ["scalellm.ipc", "other"],
            {"ipc": "off", "sim": {"gpu": "h100", "model": "8b"}},
        )
    ]


def test_without_our_options_nothing_happens_and_nothing_is_left_in_the_namespace(
    calls: list[tuple[list[str], dict[str, object]]],
) -> None:
    parser = add_arguments(argparse.ArgumentParser())
    assert vars(parser.parse_args([])) == {}
    assert calls == []


def test_added_twice_is_added_once() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(add_arguments(parser))
    assert parser.format_help().count("--plugins NAME") == 2  # usage line and description


def test_an_option_of_the_same_name_is_not_taken_for_ours() -> None:
    """Should vLLM get a `--plugins` of its own, silence would leave ours without effect."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--plugins")
    with pytest.raises(argparse.ArgumentError, match="conflicting"):
        add_arguments(parser)


@pytest.mark.parametrize("value", ["{", "[1]", "3"])
def test_a_value_that_is_no_object_is_a_usage_error(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = add_arguments(argparse.ArgumentParser())
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--scalellm", value])
    assert stop.value.code == 2
    assert repr(value) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--plugins scalelm", ["--plugins", "'scalelm'", "Valid: scalellm"]),
        ("--plugins scalellm.icp", ["'scalellm.icp'", "Valid: scalellm.ipc"]),
        ('--plugins scalellm --scalellm {"ipcc":1}', ["scalellm.ipcc", "ipc"]),
        ('--scalellm {"ipc":"on"}', ["no effect", "--plugins scalellm"]),
        ("--quantization scalellm_int4", ["'scalellm_int4'", "Add --plugins scalellm"]),
    ],
)
def test_mistakes_end_in_a_usage_error_before_anything_starts(
    clean_environment: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    parts: list[str],
) -> None:
    parser = add_arguments(argparse.ArgumentParser())
    parser.add_argument("--quantization")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(line.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("yaml", "remedy"),
    [
        ("scalellm: off", 'scalellm: "off"'),
        ("scalellm.ipc: off", "scalellm: {ipc: off}"),
        ("scalellm.sim.enabled: yes", "scalellm: {sim: {enabled: on}}"),
        ("scalellm: {ipc: off}", None),
        ("trust-remote-code: true", None),
    ],
)
def test_switches_that_vllms_yaml_loses_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    yaml: str,
    remedy: str | None,
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"plugins: scalellm\n{yaml}\n")
    monkeypatch.setattr("sys.argv", ["vllm", "serve", "M", "--config", str(file)])
    if remedy is None:
        add_arguments(argparse.ArgumentParser())
        return
    with pytest.raises(SystemExit):
        add_arguments(argparse.ArgumentParser())
    error = capsys.readouterr().err
    assert f"`{remedy}`" in error
    assert str(file) in error
