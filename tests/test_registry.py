"""The registry as data: complete, inside the supported range, and equal to the folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from scalellm_plugins.features import FEATURES, SUPPORTED_VLLM
from scalellm_plugins.patches import registry
from scalellm_plugins.patches.registry import PATCHES, SEAMS, Patch, Seam

FOLDER = Path(registry.__file__).parent
ENTRIES: list[Patch | Seam] = [*PATCHES, *SEAMS]
FEATURE_NAMES = {"core", *FEATURES}


def test_the_registry_equals_the_folder() -> None:
    files = {path.stem for path in FOLDER.glob("patch_*.py")}
    assert {patch.module for patch in PATCHES} == files


def test_names_are_unique() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_says_everything(entry: Patch | Seam) -> None:
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        assert value or value is False, f"{entry.name}: {field.name} is empty"
        assert "\n" not in str(value)
    assert entry.feature in FEATURE_NAMES
    for target in entry.targets:
        assert all(module.partition(".")[0] == "vllm" for module in target.modules)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_a_patch_is_named_after_the_module_it_changes(patch: Patch) -> None:
    # vllm.engine.arg_utils → patch_engine_arg_utils
    modules = {m.removeprefix("vllm.") for target in patch.targets for m in target.modules}
    # A second patch of a module says in one word more what it changes there.
    named = patch.module.removeprefix("patch_")
    assert any(f"{named}_".startswith(m.replace(".", "_") + "_") for m in modules)


def test_every_feature_is_watched() -> None:
    assert {entry.feature for entry in ENTRIES} == FEATURE_NAMES


def _inside(specifier: str) -> bool:
    """Whether a range lies in the supported one, by trying every minor release around it."""
    releases = [f"0.{minor}.{patch}" for minor in range(20, 60) for patch in (0, 1)]
    supported = SpecifierSet(SUPPORTED_VLLM)
    return all(r in supported for r in releases if r in SpecifierSet(specifier))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_ranges_lie_inside_the_supported_one(entry: Patch | Seam) -> None:
    assert _inside(entry.vllm)
    for target in entry.targets:
        # Open to one side is fine for a target: it holds only within its entry's range anyway.
        assert _inside(",".join(filter(None, (target.vllm, entry.vllm))))
