"""Contracts: what must exist upstream, and the facts about it that a patch relies on.

A `Target` is data. `check` compares it with source, by syntax tree and never by importing, so the
very same check runs on the installed vLLM, on a wheel that is not installed, and (with `live.py`
on top) on the object about to be replaced. Pure: imports neither vLLM nor torch.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from .sources import Definition, Function, Source, SourceError, bindings, dotted

Kind = Literal["function", "class", "attribute"]
Binding = Literal["instance", "staticmethod", "classmethod", "property"]

_A: dict[Kind, str] = {"function": "a function", "class": "a class", "attribute": "an attribute"}

_UNSET: Any = object()


@dataclass(frozen=True, kw_only=True)
class Target:
    """One name upstream, and the facts about it that are relied on; what is unset is not checked.

    `module` may list alternatives, newest first, for a module that moved. `vllm` (PEP 440) limits
    the contract to the releases that it describes: a seam that changed within the supported range
    is two targets with adjoining ranges.
    """

    module: str | tuple[str, ...]
    qualname: str
    kind: Kind = "function"
    vllm: str = ""

    # Of a function.
    parameters: tuple[str, ...] | None = None
    """Leading parameters, in order and without `self`/`cls`, as they would be passed by position.

    Further ones may follow if they have defaults: a call that does not know them still works.
    """

    keywords: tuple[str, ...] = ()
    """Parameters passed by name: they exist, in any order, whatever else there is."""

    binding: Binding | None = None
    is_async: bool | None = None
    calls: tuple[str, ...] = ()
    """Calls that the body makes, in this order; "f" also matches `module.f()` and `self.f()`."""

    reads: tuple[str, ...] = ()
    """Names or attributes that the body reads, "f" matching `x.f` too."""

    assigns: tuple[str, ...] = ()
    """Attributes that the body assigns, also by `+=`: "self.waiting"."""

    returns: str | None = None
    """The name that every `return` returns, and there is at least one."""

    # Of a class.
    members: tuple[str, ...] = ()
    """Methods and class attributes, inherited ones included."""

    fields: tuple[str, ...] = ()
    """The leading annotated fields in order: what an array-like struct is on the wire."""

    implements: tuple[str, ...] | None = None
    """What a subclass of ours implements: no other method may be abstract."""

    constructed_with: tuple[str, ...] | None = None
    """Keywords that we construct it with: each is a field, and no other field lacks a default."""

    bases: tuple[str, ...] = ()
    """Names of classes it inherits from, directly or not."""

    # Of an attribute.
    value: Any = _UNSET
    """The literal that it is assigned."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The module and its alternatives."""
        return (self.module,) if isinstance(self.module, str) else self.module

    @property
    def label(self) -> str:
        """`module.qualname`, with the first module standing for the alternatives."""
        return f"{self.modules[0]}.{self.qualname}"


def matches(version: str, specifier: str) -> bool:
    """Return whether a release is within a PEP 440 specifier; "" holds every release.

    Pre-releases count as what they are near to: 0.34.0rc1 and 0.34.0.dev3 are not <0.34, a local
    label (0.32.0+cpu) changes nothing. What PEP 440 cannot read ("dev") is in no range.
    """
    if not specifier:
        return True
    # Imported here for start-up's sake. Every vLLM has it: transformers and huggingface_hub,
    # which vLLM requires, require it.
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def locate(target: Target, source: Source) -> Definition | None:
    """Return the target's definition, looking through the alternative modules in turn."""
    for module in target.modules:
        found = source.find(module, target.qualname)
        if found is not None:
            return found
    return None


def check(target: Target, source: Source) -> list[str]:
    """Return one line for each way in which `source` breaks the contract; empty when it holds.

    A target whose `vllm` range does not hold the source's version is not checked.
    """
    if not matches(source.version, target.vllm):
        return []
    try:
        found = locate(target, source)
        if found is None:
            return [_missing(target, source)]
        facts = list(_facts(target, found, source))
    except SourceError as error:
        return [f"{target.label}: {error}"]
    return [f"{target.label}: expected {expected}, found {actual}" for expected, actual in facts]


def _missing(target: Target, source: Source) -> str:
    """Say what is not there: the module, the owner or the name; with the nearest name, if any."""
    present = [name for name in target.modules if source.module(name) is not None]
    if not present:
        places = " or ".join(target.modules)
        return f"{target.label}: expected a module {places}, found none"
    owner, _, name = target.qualname.rpartition(".")
    if owner:
        found = source.find(present[0], owner)
        if found is None or not isinstance(found.node, ast.ClassDef):
            return f"{target.label}: expected a class {owner} in {present[0]}, found none"
        names = [n for cls in source.mro(found) for n, _ in bindings(_body(cls))]
        where = f"{present[0]}.{owner}"
    else:
        module = source.module(present[0])
        names = list(module.names) if module else []
        where = present[0]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    hint = f" (the nearest name is {near[0]})" if near else ""
    return f"{target.label}: expected {_A[target.kind]} {name} in {where}, found none{hint}"


def _body(cls: Definition) -> list[ast.stmt]:
    assert isinstance(cls.node, ast.ClassDef)
    return cls.node.body


Mismatch = tuple[str, str]
"""(what was expected, what was found)"""


def kind_of(found: Definition) -> Kind:
    """Return what a definition is: methods are functions, assignments are attributes."""
    if isinstance(found.node, Function):
        return "function"
    return "class" if isinstance(found.node, ast.ClassDef) else "attribute"


def _facts(target: Target, found: Definition, source: Source) -> Iterator[Mismatch]:
    kind = kind_of(found)
    if kind != target.kind:
        yield _A[target.kind], f"{_A[kind]} ({found.path}:{found.node.lineno})"
    elif isinstance(found.node, Function):
        for fact in (_binding, _asyncness, _signature, _keywords, _calls, _names, _returns):
            yield from fact(target, found.node)
    elif isinstance(found.node, ast.ClassDef):
        chain = [(cls, _body(cls)) for cls in source.mro(found)]
        yield from _class_facts(target, found, chain)
    elif target.value is not _UNSET:
        yield from _literal(target, found.node)


# ---- Facts about a function -------------------------------------------------------------------


def binding_of(node: Function) -> Binding:
    """Return how a method is bound; a plain function counts as "instance"."""
    for decorator in node.decorator_list:
        match dotted(decorator).rpartition(".")[2]:
            case "staticmethod":
                return "staticmethod"
            case "classmethod":
                return "classmethod"
            case "property" | "cached_property":
                return "property"
    return "instance"


def _binding(target: Target, node: Function) -> Iterator[Mismatch]:
    names = {"instance": "a plain method", "property": "a property"}
    expected, actual = target.binding, binding_of(node)
    if expected is not None and expected != actual:
        yield names.get(expected, f"a {expected}"), names.get(actual, f"a {actual}")


def _asyncness(target: Target, node: Function) -> Iterator[Mismatch]:
    actual = isinstance(node, ast.AsyncFunctionDef)
    if target.is_async is not None and target.is_async != actual:
        kinds = {True: "async def", False: "def"}
        yield kinds[target.is_async], kinds[actual]


def _signature(target: Target, node: Function) -> Iterator[Mismatch]:
    if target.parameters is None:
        return
    positional = [*node.args.posonlyargs, *node.args.args]
    names = [argument.arg for argument in positional]
    if names[:1] in (["self"], ["cls"]):
        names = names[1:]
    expected = f"parameters ({', '.join(target.parameters)})"
    actual = f"({', '.join(_shown(node.args))})"
    wanted = len(target.parameters)
    if tuple(names[:wanted]) != target.parameters:
        yield expected, actual
        return
    required = names[wanted : len(names) - len(node.args.defaults)]
    required += _required_keywords(node.args)
    if extra := [name for name in required if name not in target.keywords]:
        yield expected, f"{actual}, where {', '.join(extra)} has no default"


def _required_keywords(arguments: ast.arguments) -> list[str]:
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return [argument.arg for argument, default in pairs if default is None]


def _shown(arguments: ast.arguments) -> Iterator[str]:
    """Yield the parameters as a reader would write them, without annotations or defaults."""
    for argument in (*arguments.posonlyargs, *arguments.args):
        if argument.arg not in ("self", "cls"):
            yield argument.arg
    if arguments.vararg:
        yield f"*{arguments.vararg.arg}"
    elif arguments.kwonlyargs:
        yield "*"
    yield from (argument.arg for argument in arguments.kwonlyargs)
    if arguments.kwarg:
        yield f"**{arguments.kwarg.arg}"


def _keywords(target: Target, node: Function) -> Iterator[Mismatch]:
    accepted = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    if node.args.kwarg is not None:
        return
    for name in target.keywords:
        if name not in accepted:
            yield f"a keyword {name}", f"({', '.join(_shown(node.args))})"


def _same(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _calls(target: Target, node: Function) -> Iterator[Mismatch]:
    nodes = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
    # By where the call ends, which is closer to when it runs: in f(g()) the inner one is first.
    nodes.sort(key=lambda call: (call.end_lineno or 0, call.end_col_offset or 0))
    made = [dotted(call.func) for call in nodes]
    start = 0
    for position, wanted in enumerate(target.calls):
        index = next((i for i in range(start, len(made)) if _same(made[i], wanted)), None)
        if index is not None:
            start = index + 1
        elif any(_same(name, wanted) for name in made):
            yield f"a call of {wanted} after {target.calls[position - 1]}", "it before"
        else:
            yield f"a call of {wanted}", "none"


def _names(target: Target, node: Function) -> Iterator[Mismatch]:
    read: set[str] = set()
    assigned: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Name | ast.Attribute):
            (read if isinstance(child.ctx, ast.Load) else assigned).add(dotted(child))
    for wanted in target.reads:
        if not any(_same(name, wanted) for name in read):
            yield f"a body that reads {wanted}", "none"
    for wanted in target.assigns:
        if not any(_same(name, wanted) for name in assigned):
            yield f"a body that assigns {wanted}", "none"


def _returns(target: Target, node: Function) -> Iterator[Mismatch]:
    if target.returns is None:
        return
    returned = [ast.unparse(r.value) if r.value else "None" for r in _own_returns(node)]
    if returned != [target.returns] * max(len(returned), 1):
        yield f"it to return {target.returns}", ", ".join(returned) or "no return"


def _own_returns(node: ast.AST) -> Iterator[ast.Return]:
    """Yield the `return`s of a function without those of functions inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            yield child
        elif not isinstance(child, Function | ast.Lambda | ast.ClassDef):
            yield from _own_returns(child)


# ---- Facts about a class ----------------------------------------------------------------------

_Chain = list[tuple[Definition, list[ast.stmt]]]
"""The class and its bases, nearest first, each with its body."""


def _class_facts(target: Target, found: Definition, chain: _Chain) -> Iterator[Mismatch]:
    names = {name for _, body in chain for name, _ in bindings(body)}
    for member in target.members:
        if member not in names:
            near = difflib.get_close_matches(member, names, n=1, cutoff=0.75)
            yield f"a member {member}", f"none (the nearest is {near[0]})" if near else "none"
    ancestors = {cls.qualname for cls, _ in chain[1:]}
    for base in target.bases:
        if base not in ancestors:
            yield f"a subclass of {base}", _listed(ancestors) or "no such base"
    fields = _fields(_body(found))
    for position, field in enumerate(target.fields):
        actual = list(fields)[position : position + 1]
        if actual != [field]:
            # One line: whatever comes after the first field that differs is shifted.
            yield f"field {position} to be {field}", actual[0] if actual else "the end"
            break
    yield from _construction(target, fields)
    yield from _abstract(target, chain)


def _fields(body: list[ast.stmt]) -> dict[str, bool]:
    """Return annotated field → whether it has a default, in order."""
    return {
        node.target.id: node.value is not None
        for node in body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not ast.unparse(node.annotation).startswith(("ClassVar", "typing.ClassVar"))
    }


def _construction(target: Target, fields: dict[str, bool]) -> Iterator[Mismatch]:
    if target.constructed_with is None:
        return
    for name in target.constructed_with:
        if name not in fields:
            yield f"a field {name}", "none"
    for name, has_default in fields.items():
        if not has_default and name not in target.constructed_with:
            yield f"only ({', '.join(target.constructed_with)}) to be required", f"{name} too"


def _abstract(target: Target, chain: _Chain) -> Iterator[Mismatch]:
    """A method is abstract when its nearest definition is."""
    if target.implements is None:
        return
    nearest: dict[str, bool] = {}
    for _, body in chain:
        # `dict`, because of an overloaded method only the last definition counts.
        for name, node in dict(bindings(body)).items():
            decorators = node.decorator_list if isinstance(node, Function) else []
            nearest.setdefault(
                name, any(dotted(d).rpartition(".")[2] == "abstractmethod" for d in decorators)
            )
    for name, is_abstract in nearest.items():
        if is_abstract and name not in target.implements:
            yield f"only {_listed(target.implements)} to be abstract", f"{name} too"


def _literal(target: Target, node: ast.Assign | ast.AnnAssign) -> Iterator[Mismatch]:
    try:
        actual = ast.literal_eval(node.value) if node.value is not None else None
    except ValueError:
        assert node.value is not None
        yield f"the value {target.value!r}", ast.unparse(node.value)
        return
    if actual != target.value:
        yield f"the value {target.value!r}", repr(actual)


def _listed(names: set[str] | tuple[str, ...]) -> str:
    return ", ".join(sorted(names))
