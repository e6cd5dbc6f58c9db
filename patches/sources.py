"""Where vLLM's source is read from: an installed package, a wheel, or a test's strings.

Nothing here imports what it reads. A `Source` parses modules on demand, once, and finds a name the
way Python would: through re-exports (`from .core import Engine`) and through the bases of a class,
also when these live in another module. Pure: imports neither vLLM nor torch.
"""

from __future__ import annotations

import ast
import email
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Node = Function | ast.ClassDef | ast.Assign | ast.AnnAssign

_MAX_HOPS = 8
"""Re-exports followed for one name; more than this is a cycle."""


class SourceError(Exception):
    """A module that is there and cannot be read: its syntax is newer than this Python's."""


@dataclass(frozen=True)
class Definition:
    """Where a name is really defined, which need not be where it was asked for.

    `AsyncScheduler.schedule` is found as `Scheduler.schedule` of another module.
    """

    module: str
    path: str
    qualname: str
    node: Node


@dataclass(frozen=True)
class Module:
    """One parsed file: `name` is dotted, `path` relative to the source's root."""

    name: str
    path: str
    tree: ast.Module
    names: Mapping[str, Node | ast.alias]
    """Everything bound at the top level; an `ast.alias` is something imported from elsewhere."""

    imports: Mapping[str, tuple[str, str]]
    """Imported name → (module, its name there)."""


class Source(ABC):
    """vLLM's Python files, whichever way they are stored.

    `version` is the release they belong to, `description` says to a human where they were found,
    and `root` is the folder that holds the package where there is one (not for wheels).
    """

    def __init__(self, version: str, description: str, root: Path | None = None) -> None:
        self.version = version
        self.description = description
        self.root = root
        self._modules: dict[str, Module | None] = {}

    @abstractmethod
    def _read(self, path: str) -> bytes | None:
        """Return the bytes of `path` ("vllm/plugins/__init__.py"), or None where it is absent."""

    def module(self, name: str) -> Module | None:
        """Return the parsed module, None where there is none; raise `SourceError` on bad syntax."""
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def _parse(self, name: str) -> Module | None:
        base = name.replace(".", "/")
        for path in (f"{base}.py", f"{base}/__init__.py"):
            text = self._read(path)
            if text is None:
                continue
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError) as error:
                raise SourceError(f"{path} cannot be parsed by this Python: {error}") from error
            package = name if path.endswith("/__init__.py") else name.rpartition(".")[0]
            bound = list(bindings(tree.body))
            # What is defined here wins over what is imported: `try: from fast import f` with
            # `f = None` for a machine without it must not lead out of this source.
            names: dict[str, Node | ast.alias]
            names = {n: node for n, node in bound if isinstance(node, ast.alias)}
            names |= {n: node for n, node in bound if not isinstance(node, ast.alias)}
            return Module(name, path, tree, names, _imports(tree.body, package))
        return None

    def find(self, module: str, qualname: str, _hops: int = 0) -> Definition | None:
        """Return where `qualname` ("Class.method") of `module` is defined, or None."""
        parsed = self.module(module)
        if parsed is None or _hops > _MAX_HOPS:
            return None
        head, *rest = qualname.split(".")
        node = parsed.names.get(head)
        if isinstance(node, ast.alias):
            origin, name = parsed.imports.get(head, ("", ""))
            return self.find(origin, ".".join((name, *rest)), _hops + 1) if origin else None
        if node is None:
            return None
        found: Definition | None = Definition(module, parsed.path, head, node)
        for part in rest:
            if found is None or not isinstance(found.node, ast.ClassDef):
                return None
            found = self._member(found, part)
        return found

    def _member(self, owner: Definition, name: str) -> Definition | None:
        """Look `name` up in a class, then in its bases from left to right, depth first."""
        for cls in self.mro(owner):
            assert isinstance(cls.node, ast.ClassDef)
            node = dict(bindings(cls.node.body)).get(name)
            if node is not None and not isinstance(node, ast.alias):
                return Definition(cls.module, cls.path, f"{cls.qualname}.{name}", node)
        return None

    def mro(self, cls: Definition, _hops: int = 0) -> Iterator[Definition]:
        """Yield a class and those of its bases that this source holds.

        Depth first and left to right, which is the order that Python uses wherever no class is
        inherited twice; vLLM's contracts need nothing finer.
        """
        yield cls
        assert isinstance(cls.node, ast.ClassDef)
        if _hops > _MAX_HOPS:
            return
        for base in cls.node.bases:
            # Generic[T] and Base[int] inherit from what is before the bracket.
            name = dotted(base.value if isinstance(base, ast.Subscript) else base)
            found = self.find(cls.module, name) if name else None
            if found is not None and isinstance(found.node, ast.ClassDef):
                yield from self.mro(found, _hops + 1)


class FolderSource(Source):
    """An installed package: `root` is the folder that holds `vllm/`, as site-packages does."""

    def __init__(self, root: Path, version: str, description: str = "") -> None:
        super().__init__(version, description or str(root), root)
        self._root = root

    def _read(self, path: str) -> bytes | None:
        try:
            return (self._root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None


class WheelSource(Source):
    """A wheel, read in place; `FileNotFoundError` and `zipfile.BadZipFile` are the caller's."""

    def __init__(self, wheel: Path) -> None:
        self._archive = zipfile.ZipFile(wheel)
        self._files = set(self._archive.namelist())
        self.distribution, version = self._metadata()
        super().__init__(version, wheel.name)

    def _metadata(self) -> tuple[str, str]:
        """Return the distribution's name and version; empty where the zip is no wheel."""
        for name in self._files:
            if name.endswith(".dist-info/METADATA") and name.count("/") == 1:
                headers = email.message_from_bytes(self._archive.read(name))
                return headers.get("Name", ""), headers.get("Version", "")
        return "", ""

    def __contains__(self, path: str) -> bool:
        return path in self._files

    def _read(self, path: str) -> bytes | None:
        return self._archive.read(path) if path in self._files else None


class TextSource(Source):
    """Modules given as strings, path → text: what tests use."""

    def __init__(self, files: Mapping[str, str], version: str = "0.32.0") -> None:
        super().__init__(version, "text")
        self._texts = files

    def _read(self, path: str) -> bytes | None:
        text = self._texts.get(path)
        return None if text is None else text.encode()


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` for such an expression, and "" for any other.

    `super().x` and `f().x` keep their call as "super().x", so that they can be named too.
    """
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    if isinstance(node, ast.Call) and not node.args and not node.keywords:
        owner = dotted(node.func)
        return f"{owner}()" if owner else ""
    return ""


def bindings(body: list[ast.stmt]) -> Iterator[tuple[str, Node | ast.alias]]:
    """Yield (name, node) for what a block binds, in order, so that `dict` keeps the last.

    Both branches of `if TYPE_CHECKING` and of `try … except ImportError` count: whichever runs,
    the name exists. Of an overloaded function the implementation comes last; setters and deleters
    of a property are skipped because the getter is what defines it.
    """
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not any(
                dotted(decorator).endswith((".setter", ".deleter"))
                for decorator in node.decorator_list
            ):
                yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, node) for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, alias) for alias in node.names)
        else:
            for block in _blocks(node):
                yield from bindings(block)


def _blocks(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    """Yield the statement lists inside `if`, `try` and `with`; handlers before the body.

    Handlers first, so that the body's binding (the usual case) is the one that stays.
    """
    if isinstance(node, ast.Try):
        yield from (handler.body for handler in node.handlers)
        yield from (node.body, node.orelse, node.finalbody)
    elif isinstance(node, ast.If):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.With):
        yield node.body


def _imports(body: list[ast.stmt], package: str) -> dict[str, tuple[str, str]]:
    """Return imported name → (absolute module, name there), for `from … import …`."""
    found: dict[str, tuple[str, str]] = {}
    for node in body:
        if isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = package.split(".")
                kept = parents[: len(parents) - node.level + 1]
                origin = ".".join((*kept, origin) if origin else kept)
            found |= {alias.asname or alias.name: (origin, alias.name) for alias in node.names}
        else:
            for block in _blocks(node):
                found |= _imports(block, package)
    return found
