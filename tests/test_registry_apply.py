"""Applying patches: once, all or nothing, and never over somebody else's."""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

from scalellm_plugins import compat
from scalellm_plugins.errors import ContractError, UnsupportedVLLMError
from scalellm_plugins.features import SUPPORTED_VLLM
from scalellm_plugins.patches import registry
from scalellm_plugins.patches.contracts import Target
from scalellm_plugins.patches.registry import Patch, replace
from scalellm_plugins.patches.sources import FolderSource

SOURCE = '''
import functools

def own_decorator(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper

class Base:
    def inherited(self):
        return "base"

class Engine(Base):
    @staticmethod
    def add(parser):
        """Add."""
        return parser

    @classmethod
    def make(cls, config):
        return (cls, config)

    @own_decorator
    def run(self, steps):
        return steps

    def stop(self):
        return "stopped"

def free(x):
    return x
'''


@dataclasses.dataclass
class World:
    """A package to patch, and how a patch of it is made."""

    module: Any
    define: Callable[..., Patch]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A package `fakevllm` on sys.path that takes the installed vLLM's place."""
    package = tmp_path / "fakevllm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "engine.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import fakevllm.engine

    source = FolderSource(tmp_path, "0.32.0")
    monkeypatch.setattr(compat, "installed_source", lambda: source)
    made = []

    def define(apply: Callable[[], None], qualname: str = "Engine.add", **facts: Any) -> Patch:
        vllm = facts.pop("vllm", SUPPORTED_VLLM)
        composes = facts.pop("composes", False)
        name = f"fake_{len(made)}"
        module = ModuleType(f"scalellm_plugins.patches.patch_{name}")
        module.apply = apply  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        made.append(
            Patch(
                name=name,
                feature="status",
                module=f"patch_{name}",
                targets=(Target(module="fakevllm.engine", qualname=qualname, **facts),),
                why="a test",
                how="a test",
                when="process",
                remove_when="never",
                vllm=vllm,
                composes=composes,
            )
        )
        return made[-1]

    yield World(fakevllm.engine, define)
    for patch in made:
        registry.undo(patch)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fakevllm"]:
        del sys.modules[name]


def replace_add(module: Any) -> Callable[[], None]:
    """An `apply` that makes `Engine.add` return its argument twice."""

    def apply() -> None:
        original = module.Engine.add

        def add(parser: Any) -> Any:
            return (original(parser), parser)

        replace(module.Engine, "add", add)

    return apply


def test_apply_replaces_once_and_undo_restores(world: World) -> None:
    engine = world.module.Engine
    before = vars(engine)["add"]
    patch = world.define(replace_add(world.module), parameters=("parser",))
    outcomes = [registry.apply(patch) for _ in range(3)]
    assert [outcome.state for outcome in outcomes] == ["applied", "already", "already"]
    assert all(outcome.on and not outcome.reason for outcome in outcomes)
    assert engine.add(1) == engine().add(1) == (1, 1)  # once, and still a staticmethod
    registry.undo(patch)
    assert vars(engine)["add"] is before
    registry.undo(patch)
    assert registry.apply(patch).state == "applied"


def test_a_replacement_is_marked_and_keeps_the_original(world: World) -> None:
    original = world.module.Engine.add
    patch = world.define(replace_add(world.module))
    registry.apply(patch)
    new = world.module.Engine.add
    assert new.__scalellm_patch__ == patch.name
    assert new.__wrapped__ is original
    assert (new.__name__, new.__qualname__, new.__doc__) == ("add", "Engine.add", "Add.")


def test_classmethods_and_module_functions_keep_their_binding(world: World) -> None:
    module = world.module

    def apply() -> None:
        make = vars(module.Engine)["make"].__func__
        free = module.free
        replace(module.Engine, "make", lambda cls, config: (*make(cls, config), "new"))
        replace(module, "free", lambda x: free(x) + 1)

    registry.apply(world.define(apply, "Engine.make", binding="classmethod"))
    assert module.Engine.make(1) == (module.Engine, 1, "new")
    assert module.free(1) == 2


def test_undo_of_an_inherited_method_removes_the_override(world: World) -> None:
    engine = world.module.Engine
    patch = world.define(
        lambda: replace(engine, "inherited", lambda self: "ours"), "Engine.inherited"
    )
    assert registry.apply(patch).on
    assert engine().inherited() == "ours"
    registry.undo(patch)
    assert engine().inherited() == "base"
    assert "inherited" not in vars(engine)


@pytest.mark.parametrize("error", [ValueError("half way\nthrough"), KeyboardInterrupt()])
def test_a_failing_apply_leaves_nothing_behind(world: World, error: BaseException) -> None:
    engine = world.module.Engine
    before = dict(vars(engine)), world.module.free

    def apply() -> None:
        replace(engine, "add", lambda parser: None)
        replace(engine, "add", lambda parser: None)
        replace(engine, "inherited", lambda self: None)
        replace(world.module, "free", lambda x: None)
        raise error

    patch = world.define(apply)
    if isinstance(error, Exception):
        outcome = registry.apply(patch)
        assert outcome.state == "off"
        assert outcome.reason == f"{patch.module}.apply raised ValueError: half way"
        with pytest.raises(ContractError):
            registry.apply(patch, strict=True)
    else:
        with pytest.raises(KeyboardInterrupt):
            registry.apply(patch)
    assert (dict(vars(engine)), world.module.free) == before


def test_a_mismatch_turns_the_patch_off_with_one_line(world: World) -> None:
    called = []
    patch = world.define(lambda: called.append(1), parameters=("p",), binding="classmethod")
    outcome = registry.apply(patch)
    assert outcome.state == "off"
    assert not outcome.on
    assert "\n" not in outcome.reason
    assert outcome.reason.startswith("fakevllm.engine.Engine.add: expected ")
    assert outcome.reason.endswith("(and 1 more)")
    assert not called


def test_strict_raises_with_every_reason_and_the_remedy(world: World) -> None:
    patch = world.define(lambda: None, parameters=("p",), binding="classmethod")
    with pytest.raises(ContractError) as caught:
        registry.apply(patch, strict=True)
    text = str(caught.value)
    for part in (patch.name, "status", "expected a classmethod", "(p)", "--scalellm.strict"):
        assert part in text


def test_a_release_outside_the_range_turns_the_patch_off(world: World) -> None:
    patch = world.define(replace_add(world.module), vllm=">=0.29,<0.31")
    reason = registry.apply(patch).reason
    assert reason == "written for vLLM >=0.29,<0.31, this is 0.32.0"


def test_without_vllm_the_patch_is_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> None:
        raise UnsupportedVLLMError("no vLLM in /somewhere")

    monkeypatch.setattr(compat, "installed_source", nothing)
    assert registry.apply(world.define(lambda: None)).reason == "no vLLM in /somewhere"


# ---- Somebody was there first -----------------------------------------------------------------


def foreign(parser: Any) -> Any:
    return ("foreign", parser)


def test_a_replaced_function_is_noticed(world: World) -> None:
    world.module.Engine.add = staticmethod(foreign)
    reason = registry.apply(world.define(replace_add(world.module))).reason
    assert "Engine.add: expected vLLM's own, found it replaced by " in reason
    assert f".foreign ({__file__}:" in reason
    assert world.module.Engine.add(1) == ("foreign", 1)


def test_a_patch_that_only_adds_composes_with_others(world: World) -> None:
    world.module.Engine.add = staticmethod(functools.wraps(world.module.Engine.add)(foreign))
    assert registry.apply(world.define(replace_add(world.module), composes=True)).on


def test_a_wrapper_that_copies_names_is_noticed(world: World) -> None:
    world.module.Engine.add = staticmethod(functools.wraps(world.module.Engine.add)(foreign))
    assert f".foreign ({__file__}:" in registry.apply(world.define(lambda: None)).reason


def test_a_wrapper_around_a_decorated_function_is_noticed(world: World) -> None:
    assert registry.apply(world.define(lambda: None, "Engine.run")).state == "applied"
    world.module.Engine.run = functools.wraps(world.module.Engine.run)(foreign)
    reason = registry.apply(world.define(lambda: None, "Engine.run")).reason
    assert "found it replaced by" in reason


@pytest.mark.parametrize(
    ("culprit", "said"),
    [
        (functools.partial(foreign), "a functools.partial object"),
        (MagicMock(), "a unittest.mock.MagicMock object"),
        (len, "a builtins.builtin_function_or_method object"),
    ],
)
def test_what_has_no_code_is_named_by_its_type(world: World, culprit: Any, said: str) -> None:
    world.module.free = culprit
    assert said in registry.apply(world.define(lambda: None, "free")).reason


def test_another_function_of_the_same_package_is_noticed(world: World) -> None:
    world.module.Engine.add = world.module.Engine.stop
    assert "Engine.stop" in registry.apply(world.define(lambda: None)).reason


def test_a_replaced_class_is_noticed(world: World) -> None:
    class Impostor:
        @staticmethod
        def add(parser: Any) -> Any:
            return parser

    world.module.Engine = Impostor
    reason = registry.apply(world.define(lambda: None, "Engine", kind="class")).reason
    assert "Impostor" in reason
    assert "Impostor" in registry.apply(world.define(lambda: None)).reason


def test_a_removed_function_is_noticed(world: World) -> None:
    del world.module.Engine.add
    assert "somebody removed it" in registry.apply(world.define(lambda: None)).reason


def test_a_module_that_cannot_be_imported_is_a_reason(world: World) -> None:
    path = Path(world.module.__file__)
    path.with_name("broken.py").write_text("def f(): ...\nraise ImportError('no libfoo')\n")
    patch = world.define(lambda: None)
    target = Target(module="fakevllm.broken", qualname="f")
    reason = registry.apply(dataclasses.replace(patch, targets=(target,))).reason
    assert reason == "fakevllm.broken.f: importing it raised ImportError: no libfoo"


def test_two_patches_of_ours_may_share_a_target(world: World) -> None:
    first, second = (world.define(replace_add(world.module)) for _ in range(2))
    assert registry.apply(first).on
    assert registry.apply(second).on
    assert world.module.Engine.add(1) == (((1, 1)), 1)
    registry.undo(second)
    assert world.module.Engine.add(1) == (1, 1)


def test_a_foreign_wrapper_over_ours(world: World) -> None:
    """The patch below stays applied; a further one of ours does not pass the foreigner by."""
    patch = world.define(replace_add(world.module))
    registry.apply(patch)
    world.module.Engine.add = staticmethod(functools.wraps(world.module.Engine.add)(foreign))
    assert registry.apply(patch).state == "already"
    assert ".foreign (" in registry.apply(world.define(replace_add(world.module))).reason


def test_threads_apply_a_patch_once(world: World) -> None:
    patch = world.define(replace_add(world.module))
    barrier = threading.Barrier(8)
    states = []

    def apply() -> None:
        barrier.wait()
        states.append(registry.apply(patch).state)

    threads = [threading.Thread(target=apply) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(states) == ["already"] * 7 + ["applied"]
    assert world.module.Engine.add(1) == (1, 1)


def test_replace_outside_of_apply_is_our_bug(world: World) -> None:
    with pytest.raises(AssertionError):
        replace(world.module, "free", lambda x: x)
