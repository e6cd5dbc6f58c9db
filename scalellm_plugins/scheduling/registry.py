"""Policies by name: those that are built in, and those of plugins.

A plugin is an installed package with an entry point in the group `scalellm.policies`:

    [project.entry-points."scalellm.policies"]
    mine = "my_package:MyPolicy"

and its name can stand in `--scalellm.scheduler.policy mine`, alone or within others:
`priority,mine`. Nothing is imported before it is asked for; names alone cost no import.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from scalellm_plugins.errors import ConfigError, closest_first

from .policy import Engine, Policy, Stack

if TYPE_CHECKING:
    from scalellm_plugins.config import SchedulerConfig

GROUP = "scalellm.policies"
OPTION = "scalellm.scheduler.policy"

_HERE = __package__
BUILT_IN = {
    "fcfs": f"{_HERE}.policy:Policy",
    "priority": f"{_HERE}.priority:Priority",
    "fair": f"{_HERE}.fair:Fair",
    "deadline": f"{_HERE}.deadline:Deadline",
}
"""Name → "module:Class"."""


def names() -> list[str]:
    """Return every name that there is: built-in ones, then plugins' in alphabetical order."""
    return [*BUILT_IN, *sorted({point.name.lower() for point in _plugins()} - BUILT_IN.keys())]


def split(text: str) -> list[str]:
    """Return the names in an option's value, outermost first, in lower case.

    Raises:
        ConfigError: one is missing, unknown, or there twice.
    """
    given = [name.strip().lower() for name in text.split(",")]
    # Plugins' names are looked for on the disk: not where nobody asks for one.
    valid = BUILT_IN.keys() if BUILT_IN.keys() >= set(given) else names()
    for name in given:
        if name not in valid:
            shown = ", ".join(closest_first(name, valid))
            raise ConfigError(
                f"{OPTION}: {name!r} is unknown. Valid: {shown}; several, separated by commas: "
                "the first decides, of equals the second"
            )
        if given.count(name) > 1:
            raise ConfigError(f"{OPTION}: {text!r} names {name} twice. Name it once")
    return given


def make(text: str, engine: Engine, options: SchedulerConfig) -> Policy:
    """Make the policy that an option's value names; several: one within the other.

    Raises:
        ConfigError: a name cannot be (see `split`), a plugin cannot be loaded or is no policy, or
            a policy refuses its options.
    """
    made = [_find(name)(engine, options) for name in split(text)]
    return made[0] if len(made) == 1 else Stack(made)


def load(target: str, whose: str = "") -> type[Policy]:
    """Import "module:Class"; `whose` says in an error where that was written.

    Raises:
        ConfigError: it cannot be imported, or is not a `Policy`.
    """
    module, _, qualname = target.partition(":")
    whose = whose or repr(target)
    try:
        found: object = importlib.import_module(module)
        for attribute in qualname.split("."):
            found = getattr(found, attribute)
    # Whatever a package of somebody else's raises when it is imported.
    except Exception as error:
        raise ConfigError(
            f"{OPTION}: {whose} cannot be loaded: {type(error).__name__}: {error}. Mend or remove "
            "it, or name another policy"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ConfigError(
            f"{OPTION}: {whose} is not a policy: {found!r} does not inherit from "
            f"{Policy.__module__}.{Policy.__qualname__}"
        )
    return found


def _plugins() -> Sequence[EntryPoint]:
    return tuple(entry_points(group=GROUP))


def _find(name: str) -> type[Policy]:
    if name in BUILT_IN:
        return load(BUILT_IN[name])
    points = [point for point in _plugins() if point.name.lower() == name]
    described = [
        f"{point.value!r} of {point.dist.name if point.dist else 'an unknown package'}"
        for point in points
    ]
    if len({point.value for point in points}) > 1:
        raise ConfigError(
            f"{OPTION}: {name!r} is the name of several policies: {', '.join(described)}. Remove "
            "all but one of these packages"
        )
    return load(points[0].value, f"entry point {name} = {described[0]}")
