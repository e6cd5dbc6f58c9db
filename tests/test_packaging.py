"""What is shipped: the wheel's contents and requirements, the licence, and a cheap import."""

from __future__ import annotations

import email
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import scalellm_plugins

REPOSITORY = Path(__file__).resolve().parent.parent
HEAVY = {"vllm", "torch", "fastapi", "pydantic", "numpy", "transformers"}


@pytest.fixture(scope="session")
def project() -> dict[str, Any]:
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, project: dict[str, Any]) -> zipfile.ZipFile:
    """The built wheel. Built from a copy, because setuptools writes into the source tree."""
    source = tmp_path_factory.mktemp("source")
    output = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    for folder in top_folders(project):
        shutil.copytree(
            REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output)]
    result = subprocess.run([*command, str(source)], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = output.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="session")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def top_folders(project: dict[str, Any]) -> list[str]:
    return sorted(set(project["tool"]["setuptools"]["package-dir"].values()))


def packages_in_the_tree(project: dict[str, Any]) -> dict[str, Path]:
    """{import name: folder} of every folder that holds Python files."""
    found = {}
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        root = REPOSITORY / folder
        for path in [root, *(p for p in root.rglob("*") if p.is_dir())]:
            if path.name != "__pycache__" and any(path.glob("*.py")):
                found[".".join([package, *path.relative_to(root).parts])] = path
    return found


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    assert set(project["tool"]["setuptools"]["packages"]) == set(packages_in_the_tree(project))


def test_every_folder_with_modules_is_a_package(project: dict[str, Any]) -> None:
    for folder in packages_in_the_tree(project).values():
        assert (folder / "__init__.py").exists(), folder


def test_every_module_is_in_the_wheel(wheel: zipfile.ZipFile, project: dict[str, Any]) -> None:
    shipped = set(wheel.namelist())
    for package, folder in packages_in_the_tree(project).items():
        for module in folder.glob("*.py"):
            assert f"{package.replace('.', '/')}/{module.name}" in shipped
    assert "scalellm_plugins/py.typed" in shipped


def test_the_wheel_installs_nothing_outside_its_package(wheel: zipfile.ZipFile) -> None:
    roots = {name.partition("/")[0] for name in wheel.namelist()}
    info = f"scalellm_plugins-{scalellm_plugins.__version__}.dist-info"
    assert roots == {"scalellm_plugins", info}


def test_the_wheel_moves_no_torch_and_no_vllm(metadata: Message) -> None:
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    # Small, and in every environment that has vLLM: nothing is pulled, nothing is moved.
    assert {re.split(r"[^\w-]", line)[0] for line in always} <= {"msgspec", "packaging"}
    everything = " ".join(metadata.get_all("Requires-Dist", []))
    assert not re.search(r"\b(?:torch|vllm)\b", everything)


def test_the_metadata_says_what_it_is(metadata: Message) -> None:
    assert metadata["Version"] == scalellm_plugins.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload(), "README.md is empty"


def test_entry_points_resolve(wheel: zipfile.ZipFile, project: dict[str, Any]) -> None:
    groups = project["project"]["entry-points"] | {"scripts": project["project"]["scripts"]}
    points = [
        EntryPoint(name, value, group)
        for group, entries in groups.items()
        for name, value in entries.items()
    ]
    shipped = set(wheel.namelist())
    for point in points:
        path = point.module.replace(".", "/")
        assert {f"{path}.py", f"{path}/__init__.py"} & shipped, point
        assert callable(getattr(importlib.import_module(point.module), point.attr)), point


def test_importing_the_package_is_cheap() -> None:
    script = "import sys, json, scalellm_plugins; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    loaded = {name.partition(".")[0] for name in json.loads(result.stdout)}
    assert not loaded & HEAVY


@pytest.mark.parametrize("folder", ["frontends", "patches", "benchmarks"])
def test_a_bare_import_of_a_mapped_folder_is_banned(folder: str, project: dict[str, Any]) -> None:
    lint = project["tool"]["ruff"]["lint"]
    assert folder in lint["flake8-tidy-imports"]["banned-api"]
    assert "TID" in lint["select"]
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", "x.py", "-"]
    result = subprocess.run(
        ruff,
        cwd=REPOSITORY,
        input=f"import {folder}\n",
        check=False,
        capture_output=True,
        text=True,
    )
    assert "TID251" in result.stdout


def test_the_changelog_ends_at_this_version() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", text, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    newest, date = headings[1]
    assert newest == scalellm_plugins.__version__
    assert date


def test_the_licence_is_apache_2() -> None:
    text = (REPOSITORY / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability" in text
