"""Fetch Triton, to test the GPU kernels without a GPU: in its interpreter, and by its compiler.

It goes to a folder of its own, `.cache/triton-VERSION/`, which only those tests put on their path:
where Triton can be imported, vLLM's CPU server takes another model runner.

    python tools/fetch_triton.py

Standard library only, and pip as a command. Safe to run twice at once.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "3.6.0"
"""The one that `kernels/gpu/` was written with; on a GPU it is whichever vLLM brings."""

CACHE = Path(__file__).resolve().parents[1] / ".cache"
FOLDER = CACHE / f"triton-{VERSION}"


def main() -> int:
    """Fetch it, if it is not there."""
    if FOLDER.is_dir():
        return 0
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    print(f"Triton {VERSION}: 190 MB to download, 640 MB on disk", flush=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="fetch-") as scratch:
        made = Path(scratch) / "triton"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--target", str(made), f"triton=={VERSION}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            sys.stderr.write(
                f"Triton {VERSION} cannot be fetched:\n{done.stderr}\nThe tests of GPU kernels are "
                "skipped without it; try again: python tools/fetch_triton.py\n"
            )
            return 1
        with contextlib.suppress(OSError):  # somebody else was first
            made.rename(FOLDER)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
