"""The contract of the object that is about to be replaced: is it still vLLM's own?

Another plugin may have been there first, and a wrapper around its wrapper is something that nobody
tested. The source says where an object should come from; its code object says where it does.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

from .contracts import Target, locate
from .sources import Definition, FolderSource, Function, dotted

MARK = "__scalellm_patch__"
"""Set on every replacement, to the name of its patch."""

_TRANSPARENT = frozenset(
    {"staticmethod", "classmethod", "property", "cached_property", "abstractmethod", "overload"}
)
"""Decorators that leave the function's own code in sight."""


def check(target: Target, source: FolderSource) -> list[str]:
    """Return why the live object is not the one that the source defines; empty when it is.

    Imports the target's module. Attributes that are neither functions nor classes are not compared:
    there is nothing on them that says who assigned them.
    """
    definition = locate(target, source)
    assert definition is not None, f"{target.label}: check the source before the live object"
    try:
        found = _lookup(definition)
    except Exception as error:
        return [f"{target.label}: importing it raised {type(error).__name__}: {error}"]
    if found is None:
        return [f"{target.label}: expected it in the running vLLM, found none: somebody removed it"]
    if inspect.isclass(found):
        culprit = _foreign_class(found, definition)
    elif isinstance(definition.node, Function):
        culprit = _foreign_function(found, definition, source)
    else:
        culprit = None
    return [f"{target.label}: expected vLLM's own, found it replaced by {culprit}"] * bool(culprit)


def _lookup(definition: Definition) -> Any:
    """Return the live object, unbound, or None when it is gone."""
    found: Any = importlib.import_module(definition.module)
    for part in definition.qualname.split("."):
        try:
            found = inspect.getattr_static(found, part)
        except AttributeError:
            return None
    return found


def _foreign_class(found: type, definition: Definition) -> str | None:
    here = f"{definition.module}.{definition.qualname}"
    actual = f"{found.__module__}.{found.__qualname__}"
    return None if actual == here else actual


def _foreign_function(found: Any, definition: Definition, source: FolderSource) -> str | None:
    """Return who replaced or wrapped a function, walking its wrappers from the outside.

    Our own marks are passed over. Wrappers of vLLM and of Python's library are legitimate where
    the definition is decorated; the innermost function must be the definition itself.
    """
    root = source.root
    assert root is not None
    assert isinstance(definition.node, Function)
    package = (root / definition.path.partition("/")[0]).resolve()
    decorated = not _TRANSPARENT.issuperset(_decorators(definition.node))
    defined_in = (root / definition.path).resolve()
    span = _lines(definition.node)
    for layer in _layers(found):
        if _is_ours(layer):
            continue
        code = getattr(layer, "__code__", None)
        if not isinstance(code, CodeType):
            return _who(layer)
        path = Path(code.co_filename).resolve()
        if path == defined_in and code.co_firstlineno in span:
            return None
        if not (decorated and (package in path.parents or _is_library(path))):
            return _who(layer)
    # Every layer is a legitimate decorator's, and none says what it wraps: nothing to object to.
    return None


def _decorators(node: Function) -> set[str]:
    return {dotted(decorator).rpartition(".")[2] for decorator in node.decorator_list}


def _lines(node: Function) -> range:
    """Return the lines of a function with its decorators, which is where its code object starts."""
    first = min((decorator.lineno for decorator in node.decorator_list), default=node.lineno)
    return range(first, (node.end_lineno or node.lineno) + 1)


def _is_ours(layer: Any) -> bool:
    """Whether this is a replacement of ours, and not a wrapper that copied the mark from one."""
    mark = getattr(layer, MARK, None)
    return mark is not None and mark != getattr(getattr(layer, "__wrapped__", None), MARK, None)


def _is_library(path: Path) -> bool:
    """Whether a file is Python's own; site-packages may be a folder inside the library's."""
    library = Path(sysconfig.get_path("stdlib")).resolve()
    return library in path.parents and not {"site-packages", "dist-packages"} & set(path.parts)


def _layers(found: Any) -> Iterator[Any]:
    """Yield a function and what it says that it wraps, outermost first."""
    seen = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, staticmethod | classmethod):
            found = found.__func__
        elif isinstance(found, property):
            found = found.fget
        elif isinstance(found, functools.cached_property):
            found = found.func
        else:
            yield found
            found = getattr(found, "__wrapped__", None)


def _who(layer: Any) -> str:
    """Name what stands there. `functools.wraps` copies names, so the code object is asked first."""
    code = getattr(layer, "__code__", None)
    if isinstance(code, CodeType):
        module = getattr(layer, "__globals__", {}).get("__name__", "?")
        return f"{module}.{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"
    kind = type(layer)
    return f"a {kind.__module__}.{kind.__qualname__} object"
