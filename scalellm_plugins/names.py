"""Names of plugins: what is installed, what `VLLM_PLUGINS` says, and how it is extended.

Names travel in `VLLM_PLUGINS`, because that is what vLLM itself filters every plugin group by, in
every process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points

from .errors import UnknownPluginError, closest_first
from .features import FEATURES

logger = logging.getLogger("vllm.scalellm")  # below "vllm": its handlers and its level

ALL = "scalellm"
"""The name in `--plugins` / `VLLM_PLUGINS` that asks for every safe feature."""

OPTIONS_ONLY = "scalellm.cli"
"""The name that makes the options exist and asks for nothing; see `plugin.keep_options`."""

GENERAL = "vllm.general_plugins"
ENDPOINT = "vllm.endpoint_plugins"
PLATFORM = "vllm.platform_plugins"
_GROUPS = (
    GENERAL,
    ENDPOINT,
    PLATFORM,
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)

_OPT_IN = frozenset({"lora_hf_hub_resolver"})
"""Upstream plugins that take being named in VLLM_PLUGINS as consent (here: to remote downloads)."""


def discovered(group: str | None = None) -> set[str]:
    """Names of all installed plugins of vLLM, or of one entry-point group."""
    groups = _GROUPS if group is None else (group,)
    return {point.name for name in groups for point in entry_points(group=name)}


def known_names() -> set[str]:
    """What may stand in `--plugins`: our features, ourselves and every other installed plugin."""
    ours = {ALL, *(f"{ALL}.{name}" for name in FEATURES)}
    return (discovered() | ours) - {OPTIONS_ONLY}


def environment_names() -> list[str] | None:
    """The names in `VLLM_PLUGINS`; None if it is unset (vLLM then allows every plugin)."""
    text = os.environ.get("VLLM_PLUGINS")
    return None if text is None else text.split(",")


def is_ours(name: str) -> bool:
    """Whether a plugin's name asks for this package."""
    return name == ALL or (name.startswith(ALL + ".") and name != OPTIONS_ONLY)


def asked_by_environment() -> bool:
    """Whether `VLLM_PLUGINS` names this package or one of its features."""
    return any(map(is_ours, environment_names() or []))


def check_names(names: Iterable[str], option: str) -> None:
    """Refuse names that nothing installed has.

    Raises:
        UnknownPluginError: with the name, where it came from and the valid ones, closest first.
    """
    known = known_names()
    for name in names:
        if name not in known:
            raise UnknownPluginError(
                f"{option}: no plugin is named {name!r}. "
                f"Valid: {', '.join(closest_first(name, known))}"
            )


def allowlist(named: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the new `VLLM_PLUGINS` and the general plugins that we must load ourselves.

    Where the variable was set, it is extended. Where it was unset, every discovered plugin stays
    allowed, except that being named means consent to some, so two kinds are not named for the
    user: upstream's opt-in plugins, and names that also have HTTP routes (vLLM loads those only
    when named). The latter's general part was loaded when nothing was named; `plugin.register`
    keeps doing that.
    """
    before = environment_names()
    if before is not None:
        return list(dict.fromkeys(filter(None, [*before, *named]))), []
    routes = discovered(ENDPOINT)
    silent = {name for name in discovered() - set(named) if is_ours(name) or name == OPTIONS_ONLY}
    allowed = discovered() - _OPT_IN - routes - silent
    general_only = sorted((routes & discovered(GENERAL)) - set(named) - silent)
    if general_only and not any(map(is_ours, named)):
        named = [*named, OPTIONS_ONLY]  # so that vLLM loads us, and we them
    return list(dict.fromkeys([*named, *sorted(allowed)])), general_only


def load_general(names: set[str]) -> None:
    """Load other packages' general plugins that `--plugins` named after vLLM loaded the rest."""
    for point in entry_points(group=GENERAL):
        if point.name in names and not is_ours(point.name) and point.name != OPTIONS_ONLY:
            try:
                point.load()()
            except Exception:  # as upstream: one broken plugin does not take the server down
                logger.exception("Failed to load plugin %s", point.name)
