"""Policies by name: what is built in, what packages bring, and what is said of what cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scalellm_plugins import config
from scalellm_plugins.config import SchedulerConfig
from scalellm_plugins.errors import ConfigError
from scalellm_plugins.scheduling import registry
from scalellm_plugins.scheduling.fair import Fair
from scalellm_plugins.scheduling.policy import Policy, Stack
from scalellm_plugins.testing.virtual_host import engine

OPTIONS = SchedulerConfig()

MINE = """
from scalellm_plugins.scheduling.policy import Policy

class Mine(Policy):
    name = "mine"

class Stranger:
    pass
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which packages are installed; they are forgotten after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.endswith("_policies"):
            del sys.modules[name]


def install(folder: Path, package: str, source: str = MINE, **points: str) -> None:
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}\n" for name, value in points.items()]
    (info / "entry_points.txt").write_text("[scalellm.policies]\n" + "".join(lines))
    (folder / f"{package}_policies.py").write_text(source)


def test_built_in_ones_need_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_plugins", lambda: pytest.fail("the disk was looked at"))
    assert type(registry.make("fcfs", engine(), OPTIONS)) is Policy
    made = registry.make(" Fair , fcfs", engine(), OPTIONS)
    assert isinstance(made, Stack)
    assert [type(one) for one in made.policies] == [Fair, Policy]
    assert made.name == "fair,fcfs"


def test_the_names_of_policies_are_those_that_they_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, target in registry.BUILT_IN.items():
        path = Path(registry.__file__).parent / f"{target.partition(':')[0].split('.')[-1]}.py"
        if path.exists():
            assert registry.load(target).name == name


def test_a_packages_policy_has_a_name_like_any_other(installed: Path) -> None:
    install(installed, "acme", mine="acme_policies:Mine")
    assert "mine" in registry.names()
    made = registry.make("fair,Mine", engine(), OPTIONS)
    assert isinstance(made, Stack)
    assert made.policies[1].name == "mine"
    assert type(made.policies[1]).__module__ == "acme_policies"


def test_nothing_is_imported_to_check_a_name(installed: Path) -> None:
    install(installed, "acme", "raise SystemExit", mine="acme_policies:Mine")
    parsed = config.parse({"scheduler": {"policy": "mine"}})
    assert parsed.scheduler.policy == "mine"
    assert "acme_policies" not in sys.modules


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fiar", r"scalellm\.scheduler\.policy: 'fiar' is unknown\. Valid: fair, "),
        ("priority,,fair", r"'' is unknown"),
        ("fair,priority,FAIR", r"names fair twice\. Name it once"),
        ("mine,fair2", r"'fair2' is unknown\. Valid: fair, .*mine"),
    ],
)
def test_what_is_no_name_is_refused_before_anything_starts(
    installed: Path, text: str, said: str
) -> None:
    install(installed, "acme", mine="acme_policies:Mine")
    with pytest.raises(ConfigError, match=said):
        config.parse({"scheduler": {"policy": text}})
    with pytest.raises(ConfigError, match=said):
        registry.make(text, engine(), OPTIONS)


@pytest.mark.parametrize(
    ("target", "source", "said"),
    [
        ("acme_policies:Mine", "1 / 0", "ZeroDivisionError: division by zero"),
        ("acme_policies:Other", MINE, "AttributeError: .*Other"),
        ("nowhere_policies:Mine", MINE, "ModuleNotFoundError: .*nowhere_policies"),
        ("acme_policies:Stranger", MINE, "is not a policy: .*does not inherit from"),
        ("acme_policies", MINE, "cannot be loaded"),
    ],
)
def test_a_package_that_cannot_be_used_is_named(
    installed: Path, target: str, source: str, said: str
) -> None:
    install(installed, "acme", source, mine=target)
    with pytest.raises(ConfigError, match=said) as caught:
        registry.make("mine", engine(), OPTIONS)
    assert f"entry point mine = '{target}' of acme" in str(caught.value)


def test_two_packages_with_one_name_are_refused(installed: Path) -> None:
    install(installed, "acme", mine="acme_policies:Mine")
    install(installed, "other", mine="other_policies:Mine")
    with pytest.raises(ConfigError, match=r"several policies: .*(acme|other).*(acme|other)"):
        registry.make("mine", engine(), OPTIONS)


def test_a_package_cannot_take_a_built_in_name(installed: Path) -> None:
    install(installed, "acme", fair="acme_policies:Mine")
    assert registry.names().count("fair") == 1
    assert type(registry.make("fair", engine(), OPTIONS)) is Fair


def test_a_policy_is_made_without_vllm_or_torch() -> None:
    script = (
        "import sys\n"
        "from scalellm_plugins.config import SchedulerConfig\n"
        "from scalellm_plugins.scheduling.registry import make\n"
        "from scalellm_plugins.testing.virtual_host import engine\n"
        "make('fair,fcfs', engine(), SchedulerConfig())\n"
        "assert not {'vllm', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
