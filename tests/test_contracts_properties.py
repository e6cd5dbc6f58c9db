"""Contracts against Python itself: what the contract allows is exactly what really works."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import field, make_dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.patches.contracts import Target, check
from scalellm_plugins.patches.sources import TextSource

NAMES = ("a", "b", "c", "d")


@given(
    order=st.permutations(NAMES),
    count=st.integers(0, 4),
    defaults=st.integers(0, 4),
    keyword_only=st.dictionaries(st.sampled_from(("k", "l")), st.booleans()),
    relied=st.integers(0, 3),
)
def test_parameters_hold_exactly_when_the_call_binds(
    order: list[str], count: int, defaults: int, keyword_only: dict[str, bool], relied: int
) -> None:
    names = order[:count]
    first_default = max(0, count - defaults)
    shown = [name if i < first_default else f"{name}=0" for i, name in enumerate(names)]
    if keyword_only:
        shown += ["*", *(f"{name}=0" if has else name for name, has in keyword_only.items())]
    text = f"def f({', '.join(shown)}): return {{**locals()}}"
    scope: dict[str, Any] = {}
    exec(text, scope)
    wanted = NAMES[:relied]
    try:
        bound = inspect.signature(scope["f"]).bind(*wanted)
        works = list(bound.arguments.items()) == list(zip(wanted, wanted, strict=True))
    except TypeError:
        works = False
    holds = not check(
        Target(module="m", qualname="f", parameters=wanted), TextSource({"m.py": text})
    )
    assert holds == works


@given(
    abstract=st.sets(st.sampled_from(NAMES)),
    overridden=st.sets(st.sampled_from(NAMES)),
    implements=st.sets(st.sampled_from(NAMES)),
)
def test_implements_holds_exactly_when_a_subclass_can_be_made(
    abstract: set[str], overridden: set[str], implements: set[str]
) -> None:
    methods = "".join(f"    @abstractmethod\n    def {name}(self): ...\n" for name in abstract)
    concrete = "".join(f"    def {name}(self): ...\n" for name in overridden)
    text = f"class A(ABC):\n    x = 0\n{methods}class B(A):\n    y = 0\n{concrete}"
    scope: dict[str, Any] = {"ABC": ABC, "abstractmethod": abstractmethod}
    exec(text, scope)
    ours = type("C", (scope["B"],), {name: lambda self: None for name in implements})
    try:
        ours()
        works = True
    except TypeError:
        works = False
    wanted = Target(module="m", qualname="B", kind="class", implements=tuple(implements))
    assert (not check(wanted, TextSource({"m.py": text}))) == works


@given(
    required=st.integers(0, 3),
    optional=st.integers(0, 2),
    given_=st.sets(st.sampled_from("pqrstu")),
)
def test_constructed_with_holds_exactly_when_the_call_works(
    required: int, optional: int, given_: set[str]
) -> None:
    names = "pqrstu"[: required + optional]
    cls = make_dataclass(
        "D",
        [
            (name, int) if i < required else (name, int, field(default=0))
            for i, name in enumerate(names)
        ],
    )
    body = [f"    {n}: int" + ("" if i < required else " = 0") for i, n in enumerate(names)]
    text = "\n".join(["class D:", '    """d"""', *body])
    try:
        cls(**dict.fromkeys(given_, 0))
        works = True
    except TypeError:
        works = False
    wanted = Target(module="m", qualname="D", kind="class", constructed_with=tuple(sorted(given_)))
    assert (not check(wanted, TextSource({"m.py": text}))) == works
