"""`scalellm compress`: OUT.partial, what is left there, and a disk without room."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from scalellm_plugins import cli
from scalellm_plugins.compression import journal, work
from scalellm_plugins.compression.container import Writer
from scalellm_plugins.compression.recipe import Recipe

from .compression_parts import DEMO, compress, refusal, sharded_demo


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"mine.txt": "x", "model/private.txt": "s"}, r"\(mine.txt, model/private.txt\)"),
        ({"model/private.txt": "s"}, r"\(model/private.txt\)"),
        ({"lock": "12"}, r"\(lock\)"),
        ({"journal.json": "{}", "mine.txt": "x"}, r"\(mine.txt\)"),
    ],
)
def test_a_folder_of_somebody_else_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], said: str
) -> None:
    """Its files were published in OUT, and the rest deleted."""
    partial = tmp_path / "out.partial"
    for name, text in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text(text)
    with pytest.raises(AssertionError, match=f"not made by .*{said}: name another OUT"):
        raise AssertionError(refusal(capsys, DEMO, tmp_path / "out", "--scheme", "int4"))
    found = {p.relative_to(partial).as_posix(): p for p in partial.rglob("*") if p.is_file()}
    assert {name: path.read_text() for name, path in found.items()} == files
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_ours_are_not_removed(tmp_path: Path) -> None:
    """Not at the end, and not when a run is given up."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    partial.mkdir()  # empty: nobody misses it
    for ended in (lambda w: w.give_up(refused=True), lambda w: w.finish()):
        begun = journal.begin(out, Recipe("int4"), DEMO, "")
        (partial / "mine.txt").write_text("x")
        ended(begun)
        assert [path.name for path in partial.iterdir()] == ["mine.txt"]
        (partial / "mine.txt").unlink()
    assert out.is_dir()


def stop_at(monkeypatch: pytest.MonkeyPatch, tensor: int, error: BaseException) -> None:
    write, left = Writer.write, [tensor]

    def stopping(self: Writer, name: str, data: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise error
        write(self, name, data)

    monkeypatch.setattr(Writer, "write", stopping)


Usage = namedtuple("Usage", "free")


def test_interrupted_it_goes_on_and_needs_room_for_the_rest_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = sharded_demo(tmp_path / "model", 2), tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 100, KeyboardInterrupt())
        assert compress(source, out, "--scheme", "int4") == cli.command.INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().err
    (done,) = (tmp_path / "out.partial" / "model").iterdir()
    assert done.name == "model-00001-of-00002.safetensors"
    compress(source, tmp_path / "other", "--scheme", "int4")
    rest = (tmp_path / "other" / "model-00002-of-00002.safetensors").stat().st_size
    capsys.readouterr()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(rest + work.SPARE_BYTES - 100_000))
    said = refusal(capsys, source, out, "--scheme", "int4")
    assert "needs up to 1 MB and 67 MB in reserve, and 68 MB are free there: free" in said
    assert done.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(rest + work.SPARE_BYTES))
    assert compress(source, out, "--scheme", "int4") == 0


def test_interrupted_in_a_library_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As safetensors does it: another error comes out, and the interrupt is gone."""

    def swallowing(self: Writer, name: str, data: Any) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("could not determine the shape")

    monkeypatch.setattr(Writer, "write", swallowing)
    before = signal.getsignal(signal.SIGINT)
    assert compress(DEMO, tmp_path / "out", "--scheme", "int4") == cli.command.INTERRUPTED
    assert signal.getsignal(signal.SIGINT) is before
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a limit on files' size: writes fail at the same places, and without a file's name."""
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, limits[1]))
    try:
        said = refusal(capsys, DEMO, out, "--scheme", "int4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "out.partial/model/model.safetensors cannot be written ([Errno 27]" in said
    assert "free some room there; then the same command goes on" in said
    assert not list(tmp_path.iterdir())
    assert compress(DEMO, out, "--scheme", "int4") == 0
