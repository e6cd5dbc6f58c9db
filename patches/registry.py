"""Every patch of vLLM as data, and the one way in which patches are applied.

A patch names what it changes, why, for which releases, when, and when it can go. Before it is
applied its contract is checked against the source and the live object; on a mismatch it stays off
with one line of reason, or under `strict` raises. `apply` is idempotent and all or nothing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from scalellm_plugins import compat
from scalellm_plugins.errors import ContractError, UnsupportedVLLMError

from . import contracts, live
from .catalog import PATCHES, Patch, When
from .ipc_seams import IPC_SEAMS
from .lane_seams import FAST_LANE
from .live import MARK
from .planned_seams import PLANNED
from .prefix_seams import PREFIXES
from .quantization_seams import QUANTIZATION_SEAMS
from .scheduler_seams import SCHEDULER_SEAMS
from .seams import READY, Entry, Seam
from .shared_seams import WORKERS
from .sources import Source
from .virtual_seams import VIRTUAL

__all__ = [
    "PATCHES",
    "SEAMS",
    "Entry",
    "Outcome",
    "Patch",
    "Seam",
    "add",
    "apply",
    "check",
    "patches_for",
    "replace",
    "undo",
]

logger = logging.getLogger("vllm.scalellm")  # below "vllm": its handlers and its level

SEAMS: tuple[Seam, ...] = (
    *READY,
    *FAST_LANE,
    *WORKERS,
    *IPC_SEAMS,
    *SCHEDULER_SEAMS,
    *PREFIXES,
    *VIRTUAL,
    *QUANTIZATION_SEAMS,
    *PLANNED,
)


@dataclass(frozen=True)
class Outcome:
    """What became of a patch: `reason` is one line, and empty unless the patch is off."""

    patch: str
    state: Literal["applied", "already", "off"]
    reason: str = ""

    @property
    def on(self) -> bool:
        """Whether the patch is in effect now."""
        return self.state != "off"


def patches_for(when: When) -> tuple[Patch, ...]:
    """Return the patches to apply at one moment, in the order of the registry."""
    return tuple(patch for patch in PATCHES if patch.when == when)


def check(entry: Entry, source: Source) -> list[str]:
    """Return one line for each reason why a patch or seam does not fit; empty when it does.

    A release outside the entry's range is the first reason; its targets are checked all the same,
    which is how the next release's breaks are found before the range is widened.
    """
    reasons = []
    if not contracts.matches(source.version, entry.vllm):
        reasons.append(f"written for vLLM {entry.vllm}, this is {source.version}")
    for target in entry.targets:
        reasons += contracts.check(target, source)
    return reasons


# ---- Applying ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Original:
    """What stood where a patch has put something; `inherited` when the owner had nothing itself."""

    owner: Any
    attribute: str
    value: Any
    inherited: bool

    def restore(self) -> None:
        if self.inherited:
            delattr(self.owner, self.attribute)
        else:
            setattr(self.owner, self.attribute, self.value)


@dataclass
class _State:
    """This process's patches. The lock is held while one is applied: `current` is then its name."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    originals: dict[str, list[_Original]] = field(default_factory=dict)
    current: str | None = None


_state = _State()


def apply(patch: Patch, *, strict: bool = False) -> Outcome:
    """Apply a patch unless it is applied, or its contract does not hold; never half of it.

    Returns what happened. With `strict`, anything but success raises `ContractError`.
    """
    with _state.lock:
        if patch.name in _state.originals:
            return Outcome(patch.name, "already")
        reasons = _obstacles(patch) or _run(patch)
    if not reasons:
        return Outcome(patch.name, "applied")
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    if strict:
        raise ContractError(
            f"patch {patch.name} of feature {patch.feature} cannot be applied: "
            f"{'; '.join(reasons)}. Without --scalellm.strict vLLM serves with the feature off"
        )
    return Outcome(patch.name, "off", reasons[0] + more)


def _obstacles(patch: Patch) -> list[str]:
    """Check the contract on the source first, and where it holds on the live objects."""
    try:
        source = compat.installed_source()
    except UnsupportedVLLMError as error:
        return [str(error)]
    reasons = check(patch, source)
    if not reasons and not patch.composes:
        for target in patch.targets:
            if contracts.matches(source.version, target.vllm):
                reasons += live.check(target, source)
    return reasons


def _run(patch: Patch) -> list[str]:
    """Call the patch's `apply`; put everything back and return the reason if it raises."""
    outer, _state.current = _state.current, patch.name
    _state.originals[patch.name] = []
    try:
        importlib.import_module(f"{__package__}.{patch.module}").apply()
    except BaseException as error:
        _restore(patch.name)
        if not isinstance(error, Exception):
            raise
        logger.debug("patch %s raised", patch.name, exc_info=True)
        first_line = str(error).partition("\n")[0]
        return [f"{patch.module}.apply raised {type(error).__name__}: {first_line}"]
    finally:
        _state.current = outer
    return []


def replace(owner: Any, attribute: str, new: Callable[..., Any]) -> None:
    """Put a function where `owner` (a class or module) has one; for use in a patch's `apply`.

    `new` takes over the original's name, docstring and binding (staticmethod, classmethod), keeps
    it as `__wrapped__`, and is marked with the patch's name. A patch that fails later is rolled
    back to what is replaced here. A module's name for a class can be replaced too, where the class
    is only called: `new` makes what stands in for the instance.
    """
    assert _state.current is not None, "replace() is for a patch's apply()"
    assert inspect.isfunction(new), "only functions replace functions"
    original = inspect.getattr_static(owner, attribute)
    function = original.__func__ if isinstance(original, staticmethod | classmethod) else original
    # The original's name too: what pickles by reference finds the replacement, as it should.
    # (A class's namespace is its methods, which a function has no use for.)
    updated = () if inspect.isclass(function) else functools.WRAPPER_UPDATES
    functools.update_wrapper(new, function, updated=updated)
    setattr(new, MARK, _state.current)  # after the update, which copies an inner patch's mark
    inherited = attribute not in vars(owner)
    _state.originals[_state.current].append(_Original(owner, attribute, original, inherited))
    binding = type(original) if isinstance(original, staticmethod | classmethod) else None
    setattr(owner, attribute, binding(new) if binding else new)


def add(owner: type, attribute: str, new: Callable[..., Any]) -> None:
    """Give a class a method that it has not; for use in a patch's `apply`.

    Raises:
        ContractError: the class has such an attribute already.
    """
    assert _state.current is not None, "add() is for a patch's apply()"
    if hasattr(owner, attribute):
        raise ContractError(f"{owner.__name__}.{attribute} exists already")
    setattr(new, MARK, _state.current)
    _state.originals[_state.current].append(_Original(owner, attribute, None, inherited=True))
    setattr(owner, attribute, new)


def undo(patch: Patch) -> None:
    """Put back what a patch replaced; for tests. Nothing happens when it is not applied."""
    with _state.lock:
        _restore(patch.name)


def _restore(name: str) -> None:
    # Backwards: where one attribute was replaced twice, the first original is the real one.
    for original in reversed(_state.originals.pop(name, [])):
        original.restore()
