"""Contracts on made-up modules: every way to break one gives the reason that names it."""

from __future__ import annotations

from typing import Any

import pytest

from scalellm_plugins.patches.contracts import Target, check, locate, matches
from scalellm_plugins.patches.sources import TextSource

ARGS = '''
import abc
from typing import ClassVar, overload
from .plugins import load_plugins as load_general_plugins
from fake.base import Base as Parent

GROUP = "fake.general"
computed = GROUP + "x"

if GROUP:
    def conditional(): ...
else:
    conditional = None

try:
    from missing import fast
except ImportError:
    fast = None

class Engine(Parent):
    name: str
    count: int = 0
    shared: ClassVar[int]

    def __init__(self, config, *, index=0):
        super().__init__()
        self.queue, self.other = [], 0
        self.count += 1
        start(self.run)

    @staticmethod
    def add(parser, extra=None):
        """Text."""
        load_general_plugins()
        def inner():
            return None
        parser = Parent.add(parser)
        return parser

    @property
    def state(self): return self.queue.head

    @state.setter
    def state(self, value): ...

    @overload
    def rpc(self, method: str): ...

    @abc.abstractmethod
    def rpc(self, method, timeout=None): ...

    async def start(self, app): ...
'''
BASE = """
from abc import abstractmethod
class Base:
    def inherited(self, request): self.requests = request
    @abstractmethod
    def must(self): ...
    @staticmethod
    def add(parser): return parser
"""
FILES = {
    "fake/__init__.py": "from .args import Engine\nfrom .args import Engine as Renamed\n",
    "fake/args.py": ARGS,
    "fake/base.py": BASE,
    "fake/plugins/__init__.py": "def load_plugins(): ...\n",
}


def target(qualname: str = "Engine.add", **facts: Any) -> Target:
    return Target(module=facts.pop("module", "fake.args"), qualname=qualname, **facts)


def source(**edits: str) -> TextSource:
    """The made-up package, with `fake/args.py` changed: text → its replacement."""
    text = ARGS
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    return TextSource({**FILES, "fake/args.py": text})


def edited(old: str, new: str) -> TextSource:
    return source(**{old: new})


HOLDING = [
    target(parameters=("parser",), binding="staticmethod", is_async=False, returns="parser"),
    target(parameters=("parser", "extra")),
    target(keywords=("extra",)),
    target(calls=("load_general_plugins", "Parent.add")),
    target("Engine.__init__", parameters=("config",), calls=("super().__init__", "start")),
    target("Engine.__init__", assigns=("self.queue", "self.other", "self.count")),
    target("Engine.__init__", reads=("self.run",)),
    target("Engine.state", binding="property", reads=("queue.head",)),
    target("Engine.rpc", parameters=("method",), binding="instance"),
    target("Engine.start", is_async=True, parameters=("app",)),
    target("Engine.inherited", parameters=("request",), assigns=("self.requests",)),
    target("Engine", kind="class", bases=("Base",), members=("inherited", "name", "start")),
    target("Engine", kind="class", implements=("must", "rpc")),
    target("Engine", kind="class", fields=("name", "count"), constructed_with=("name",)),
    target("GROUP", kind="attribute", value="fake.general"),
    target("fast", kind="attribute"),
    target("load_general_plugins", parameters=()),  # a re-export under another name
    target("Renamed.add", module="fake"),
    target(module=("fake.moved", "fake.args")),
]


@pytest.mark.parametrize("wanted", HOLDING, ids=lambda wanted: wanted.qualname)
def test_a_contract_that_holds_has_no_reasons(wanted: Target) -> None:
    assert check(wanted, source()) == []


BROKEN = {
    "extra parameter without a default": (
        edited("add(parser, extra=None)", "add(parser, extra)"),
        target(parameters=("parser",)),
        "fake.args.Engine.add: expected parameters (parser), "
        "found (parser, extra), where extra has no default",
    ),
    "extra keyword-only parameter without a default": (
        edited("*, index=0", "*, index"),
        target("Engine.__init__", parameters=("config",)),
        "found (config, *, index), where index has no default",
    ),
    "renamed parameter": (
        edited("add(parser, extra=None)", "add(p, extra=None)"),
        target(parameters=("parser",)),
        "expected parameters (parser), found (p, extra)",
    ),
    "another parameter in front": (
        edited("add(parser, extra=None)", "add(extra=None, parser=None)"),
        target(parameters=("parser",)),
        "found (extra, parser)",
    ),
    "lost keyword": (source(), target(keywords=("gone",)), "expected a keyword gone"),
    "missing function": (
        edited("def add(", "def add_arguments("),
        target("Engine.add_argument"),
        "expected a function add_argument in fake.args.Engine, found none "
        "(the nearest name is add_arguments)",
    ),
    "missing class": (
        source(),
        target("Motor.add"),
        "expected a class Motor in fake.args, found none",
    ),
    "missing module": (
        source(),
        target(module=("fake.new", "fake.old")),
        "expected a module fake.new or fake.old, found none",
    ),
    "a function became an attribute": (
        edited("def conditional(): ...", "conditional = 1"),
        target("conditional"),
        "expected a function, found an attribute (fake/args.py:",
    ),
    "lost call": (
        edited("load_general_plugins()\n", "pass\n"),
        target(calls=("load_general_plugins", "Parent.add")),
        "expected a call of load_general_plugins, found none",
    ),
    "calls in another order": (
        source(),
        target(calls=("Parent.add", "load_general_plugins")),
        "expected a call of load_general_plugins after Parent.add, found it before",
    ),
    "became async": (
        edited("    @staticmethod\n    def add(", "    @staticmethod\n    async def add("),
        target(is_async=False),
        "expected def, found async def",
    ),
    "no longer a staticmethod": (
        edited("@staticmethod", "@classmethod"),
        target(binding="staticmethod"),
        "expected a staticmethod, found a classmethod",
    ),
    "returns something else": (
        edited("return parser", "return parser.group"),
        target(returns="parser"),
        "expected it to return parser, found parser.group",
    ),
    "returns nothing": (
        edited("        return parser\n", ""),
        target(returns="parser"),
        "found no return",
    ),
    "no longer reads": (
        edited("start(self.run)", "start()"),
        target("Engine.__init__", reads=("self.run",)),
        "expected a body that reads self.run, found none",
    ),
    "no longer assigns": (
        edited("self.queue, self.other = [], 0", "self.deque = []"),
        target("Engine.__init__", assigns=("self.queue",)),
        "expected a body that assigns self.queue, found none",
    ),
    "renamed field": (
        edited("    count: int = 0", "    counts: int = 0"),
        target("Engine", kind="class", fields=("name", "count")),
        "expected field 1 to be count, found counts",
    ),
    "inserted field": (
        edited("    count: int = 0", "    first: int = 0\n    count: int = 0"),
        target("Engine", kind="class", fields=("name", "count")),
        "expected field 1 to be count, found first",
    ),
    "a new required field": (
        edited("    count: int = 0", "    count: int"),
        target("Engine", kind="class", constructed_with=("name",)),
        "expected only (name) to be required, found count too",
    ),
    "a new abstract method": (
        edited(
            "    async def start",
            "    @abc.abstractmethod\n    def stop(self): ...\n    async def start",
        ),
        target("Engine", kind="class", implements=("must", "rpc")),
        "expected only must, rpc to be abstract, found stop too",
    ),
    "lost member": (
        source(),
        target("Engine", kind="class", members=("starts",)),
        "expected a member starts, found none (the nearest is start)",
    ),
    "lost base": (
        edited("class Engine(Parent)", "class Engine"),
        target("Engine", kind="class", bases=("Base",)),
        "expected a subclass of Base, found no such base",
    ),
    "another value": (
        edited('"fake.general"', '"fake.plugins"'),
        target("GROUP", kind="attribute", value="fake.general"),
        "expected the value 'fake.general', found 'fake.plugins'",
    ),
    "a value that is no literal": (
        source(),
        target("computed", kind="attribute", value="x"),
        "expected the value 'x', found GROUP + 'x'",
    ),
    "source that this Python cannot parse": (
        TextSource({"fake/args.py": "def f(:\n"}),
        target("f"),
        "fake.args.f: fake/args.py cannot be parsed by this Python: ",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_contract_names_target_expected_and_found(case: str) -> None:
    broken, wanted, reason = BROKEN[case]
    found = check(wanted, broken)
    assert len(found) == 1
    assert found[0].startswith(f"{wanted.label}: ")
    assert reason in found[0]
    assert "\n" not in found[0]


def test_every_broken_fact_is_reported() -> None:
    wanted = target(parameters=("p",), binding="classmethod", is_async=True, returns="p")
    assert len(check(wanted, source())) == 4


def test_a_moved_module_is_found_wherever_it_is() -> None:
    moved = TextSource({"fake/moved.py": ARGS})
    wanted = target("GROUP", kind="attribute", module=("fake.moved", "fake.args"))
    for where, module in ((moved, "fake.moved"), (source(), "fake.args")):
        found = locate(wanted, where)
        assert found is not None
        assert found.module == module


def test_a_cycle_of_reexports_ends() -> None:
    loop = TextSource({"a.py": "from b import x\n", "b.py": "from a import x\n"})
    assert (
        "expected a function x in a, found none" in check(Target(module="a", qualname="x"), loop)[0]
    )
    selfish = TextSource({"a.py": "class C(C): pass\n"})
    assert check(Target(module="a", qualname="C.x"), selfish)


def test_a_module_is_parsed_once() -> None:
    reads: list[str] = []

    class Counting(TextSource):
        def _read(self, path: str) -> bytes | None:
            reads.append(path)
            return super()._read(path)

    counting = Counting(FILES)
    for wanted in HOLDING:
        check(wanted, counting)
    assert len(reads) == len(set(reads))


def test_a_target_of_other_releases_is_not_checked() -> None:
    wanted = target("Engine.gone", vllm=">=0.33")
    assert check(wanted, TextSource(FILES, "0.32.0")) == []
    assert check(wanted, TextSource(FILES, "0.33.0"))


@pytest.mark.parametrize(
    ("version", "specifier", "inside"),
    [
        ("0.29.0", ">=0.29,<0.34", True),
        ("0.33.1.post1", ">=0.29,<0.34", True),
        ("0.32.0+cpu", ">=0.29,<0.34", True),
        ("0.34.0", ">=0.29,<0.34", False),
        ("0.34.0rc1", ">=0.29,<0.34", False),
        ("0.34.0.dev7+gabc", ">=0.29,<0.34", False),
        ("0.33.0rc2", ">=0.29,<0.34", True),
        ("0.28.1", ">=0.29,<0.34", False),
        ("dev", ">=0.29,<0.34", False),
        ("dev", "", True),
    ],
)
def test_releases_and_ranges(version: str, specifier: str, inside: bool) -> None:
    assert matches(version, specifier) is inside
