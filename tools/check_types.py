"""Run mypy over the whole package, as it is installed.

frontends/, patches/ and benchmarks/ are folders of the repository and packages of
`scalellm_plugins` (pyproject.toml maps them). mypy names a module by its folder, so it is shown a
tree of links in which every package lies where it is imported from, and its messages are turned
back into paths of the repository.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TREE = Path(".mypy_cache") / "tree"
# Of its own: what an editor's mypy caches about these files has other module names.
CACHE = Path(".mypy_cache") / "packages"


def mapped_packages() -> dict[str, str]:
    """{package: folder} of [tool.setuptools.package-dir]."""
    with Path("pyproject.toml").open("rb") as file:
        mapping: dict[str, str] = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    return mapping


def build_tree(mapping: dict[str, str]) -> dict[str, str]:
    """Make the tree anew; returns {path prefix in the tree: path prefix in the repository}."""
    shutil.rmtree(TREE, ignore_errors=True)
    prefixes = {}
    for package, folder in sorted(mapping.items()):
        target = TREE.joinpath(*package.split("."))
        target.mkdir(parents=True)
        for item in Path(folder).iterdir():
            if item.name != "__pycache__":
                (target / item.name).symlink_to(item.resolve())
        prefixes[f"{target}/"] = f"{folder}/"
    return prefixes


def main() -> int:
    """Returns mypy's exit code. Further arguments go to mypy."""
    os.chdir(REPOSITORY)
    # The longest first: scalellm_plugins/ is the beginning of all the others.
    prefixes = sorted(build_tree(mapped_packages()).items(), reverse=True)
    tools = sorted(map(str, Path("tools").glob("*.py")))
    env = os.environ | {"MYPYPATH": os.pathsep.join([str(TREE), "tools"])}
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--cache-dir",
        str(CACHE),
        *sys.argv[1:],
        str(TREE / "scalellm_plugins"),
        *tools,
    ]
    result = subprocess.run(command, check=False, env=env, stdout=subprocess.PIPE, text=True)
    output = result.stdout
    for link, folder in prefixes:
        output = output.replace(link, folder)
    print(output, end="")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
