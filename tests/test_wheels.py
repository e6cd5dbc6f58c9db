"""The contracts on the source of every supported release, from wheels that are not installed.

`tools/fetch_wheels.py` keeps them in `.cache/wheels/`. Where one is missing it is fetched; where
that fails the tests are skipped, and in CI (CI=true) they fail.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from scalellm_plugins import cli, compat
from scalellm_plugins.features import FEATURES, SUPPORTED_VLLM
from scalellm_plugins.patches.contracts import _UNSET, Target, check, locate, matches
from scalellm_plugins.patches.registry import PATCHES, SEAMS
from scalellm_plugins.patches.sources import Source, bindings

_TOOL = Path(__file__).parents[1] / "tools" / "fetch_wheels.py"
_spec = spec_from_file_location("fetch_wheels", _TOOL)
assert _spec is not None
assert _spec.loader is not None
fetch_wheels: Any = module_from_spec(_spec)
_spec.loader.exec_module(fetch_wheels)

VERSIONS = tuple(fetch_wheels.VERSIONS)
TARGETS = [
    pytest.param(target, id=f"{entry.name}-{target.qualname}{target.vllm}")
    for entry in (*PATCHES, *SEAMS)
    for target in entry.targets
]
for_every_release = pytest.mark.parametrize("version", VERSIONS)


@functools.cache
def _fetched(version: str) -> Path | Exception:
    # Cached, failures too: one attempt per release and session.
    try:
        return Path(fetch_wheels.fetch(version))
    except fetch_wheels.FetchError as error:
        return error


def wheel_of(version: str) -> Path:
    """The stripped wheel; skips, or in CI fails, where there is none to be had."""
    found = _fetched(version)
    if isinstance(found, Path):
        return found
    if os.environ.get("CI") == "true":
        pytest.fail(str(found))
    pytest.skip(f"run `{fetch_wheels.COMMAND} {version}`: {found}")


@functools.cache
def source_of(version: str) -> Source:
    return compat.wheel_source(wheel_of(version))


def test_the_supported_range_is_what_the_wheels_cover() -> None:
    inside = SpecifierSet(SUPPORTED_VLLM)
    minors = [f"0.{minor}.0" for minor in range(100) if f"0.{minor}.0" in inside]
    assert minors == list(VERSIONS)


@for_every_release
def test_every_contract_holds(version: str) -> None:
    reports = compat.feature_states(source_of(version))
    assert [reason for report in reports for reason in report.reasons] == []
    assert [report.name for report in reports] == ["core", *FEATURES]
    assert all(report.contracts for report in reports)


@for_every_release
def test_doctor_agrees(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--strict", "--wheel", str(wheel_of(version))]) == 0
    assert f"vLLM {version}: every feature that is built can be on" in capsys.readouterr().out


# ---- No contract is vacuous -------------------------------------------------------------------


def _spoiled(target: Target) -> list[Target]:
    """The target once for each of its facts, with that fact made untrue."""
    bad: list[dict[str, Any]] = [{"qualname": target.qualname + "_gone"}]
    for name in ("keywords", "calls", "reads", "assigns", "members", "fields", "bases"):
        if value := getattr(target, name):
            bad.append({name: (*value, "zzz")})
    for name in ("parameters", "constructed_with"):
        if (value := getattr(target, name)) is not None:
            bad.append({name: (*value, "zzz")})
    if target.binding is not None:
        bad.append({"binding": "instance" if target.binding == "property" else "property"})
    if target.is_async is not None:
        bad.append({"is_async": not target.is_async})
    if target.returns is not None:
        bad.append({"returns": "zzz"})
    if target.implements:
        bad.append({"implements": target.implements[1:]})
    if target.value is not _UNSET:
        bad.append({"value": "zzz"})
    return [dataclasses.replace(target, **changes) for changes in bad]


@pytest.mark.parametrize("target", TARGETS)
def test_every_fact_is_really_checked(target: Target) -> None:
    """Each fact, made untrue, is found on the newest release that the target describes."""
    version = [version for version in VERSIONS if matches(version, target.vllm)][-1]
    source = source_of(version)
    assert check(target, source) == []
    for spoiled in _spoiled(target):
        assert check(spoiled, source), spoiled


RANGED = [parameter for parameter in TARGETS if parameter.values[0].vllm]


@pytest.mark.parametrize("target", RANGED)
def test_every_range_is_needed_and_exact(target: Target) -> None:
    """On the releases outside of a target's range its contract is broken."""
    everywhere = dataclasses.replace(target, vllm="")
    outside = [version for version in VERSIONS if not matches(version, target.vllm)]
    assert outside
    for version in outside:
        assert check(everywhere, source_of(version)), version


@pytest.mark.parametrize(
    "target", [parameter for parameter in TARGETS if len(parameter.values[0].modules) > 1]
)
def test_every_alternative_module_is_needed(target: Target) -> None:
    found = [locate(target, source_of(version)) for version in VERSIONS]
    assert [*dict.fromkeys(one.module for one in found if one)] == [*reversed(target.modules)]


@for_every_release
def test_nothing_makes_the_command_line_patch_removable_yet(version: str) -> None:
    """`remove_when` of cli_arguments: a seam for options would be a new group of plugins.

    If this fails, look at the new group: the patch, or another one, may have become superfluous.
    """
    module = source_of(version).module("vllm.plugins")
    assert module is not None
    groups = {name for name, _ in bindings(module.tree.body) if name.endswith("_GROUP")}
    assert groups == {
        "DEFAULT_PLUGINS_GROUP",
        "ENDPOINT_PLUGINS_GROUP",
        "IO_PROCESSOR_PLUGINS_GROUP",
        "PLATFORM_PLUGINS_GROUP",
        "STAT_LOGGER_PLUGINS_GROUP",
    }


# ---- The next release, before it is there -----------------------------------------------------


def next_release(folder: Path, path: str, old: str, new: str) -> str:
    """A copy of the newest wheel in which one file was changed."""
    copy = folder / "vllm-0.33.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel_of(VERSIONS[-1])) as source, zipfile.ZipFile(copy, "w") as target:
        for name in source.namelist():
            text = source.read(name)
            if name == path:
                assert old.encode() in text
                text = text.replace(old.encode(), new.encode())
            target.writestr(name, text)
    return str(copy)


def test_doctor_on_a_release_that_breaks_a_planned_feature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = dataclasses.replace(FEATURES["quantization"], status="planned")
    monkeypatch.setitem(FEATURES, "quantization", planned)
    wheel = next_release(
        tmp_path,
        "vllm/model_executor/layers/quantization/base_config.py",
        "    def get_name(self)",
        "    def get_secret(self): ...\n\n    @abstractmethod\n    def get_name(self)",
    )
    assert cli.main(["doctor", "--wheel", wheel]) == 0
    text = capsys.readouterr().out
    where = "vllm.model_executor.layers.quantization.base_config.QuantizationConfig: "
    assert f"seam quantization_registry: {where}" in text
    assert "found get_secret too" in text
    assert "seams of planned features are broken: quantization" in text
    assert cli.main(["doctor", "--strict", "--wheel", wheel]) == 1
    assert cli.main(["doctor", "--strict", "--feature", "ipc", "--wheel", wheel]) == 0


def test_doctor_on_a_release_that_breaks_the_core(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = next_release(
        tmp_path,
        "vllm/engine/arg_utils.py",
        "def add_cli_args(parser: FlexibleArgumentParser)",
        "def add_cli_args(parser: FlexibleArgumentParser, groups: list)",
    )
    assert cli.main(["doctor", "--feature", "status", "--wheel", wheel]) == 1
    text = capsys.readouterr().out
    assert "cannot be on: core is broken" in text
    assert cli.main(["doctor", "--wheel", wheel]) == 1
    assert "found (parser, groups), where groups has no default" in capsys.readouterr().out
