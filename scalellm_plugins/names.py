"""Names of plugins: what is installed, what `VLLM_PLUGINS` says, and how it is extended.

Names travel in `VLLM_PLUGINS`, because that is what vLLM itself filters every plugin group by, in
every process.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
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
    """The names in `VLLM_PLUGINS`; None if it is unset (vLLM then allows every plugin).

    Spaces are stripped, which vLLM does not do: `keep_loadable` sees to it that ours are found.
    """
    text = os.environ.get("VLLM_PLUGINS")
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


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
    silent = {name for name in discovered() - set(named) if is_ours(name) or name == OPTIONS_ONLY}
    # Other groups than these two are filtered by the same name; there it has to stay.
    elsewhere = {name for group in _GROUPS[2:] for name in discovered(group)}
    routes = discovered(ENDPOINT) - elsewhere - set(named)
    allowed = discovered() - _OPT_IN - routes - silent
    general_only = sorted((routes & discovered(GENERAL)) - silent)
    if general_only and not any(map(is_ours, named)):
        named = [*named, OPTIONS_ONLY]  # so that vLLM loads us, and we them
    return list(dict.fromkeys([*named, *sorted(allowed)])), general_only


_loaded: set[str] = set()
"""General plugins that this process loaded in place of vLLM."""


def load_general(names: Iterable[str]) -> None:
    """Load other packages' general plugins that vLLM does not load here, each once per process."""
    wanted = {name for name in names if not is_ours(name) and name != OPTIONS_ONLY} - _loaded
    for point in entry_points(group=GENERAL):
        if point.name in wanted:
            _loaded.add(point.name)
            try:
                point.load()()
            except Exception:  # as upstream: one broken plugin does not take the server down
                logger.exception("Failed to load plugin %s", point.name)


def is_vllm_command() -> bool:
    """Whether this process is vLLM's own: `vllm …` or `python -m vllm.…`."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    words = sys.orig_argv
    module = any(
        flag == "-m" and name.startswith("vllm.") for flag, name in itertools.pairwise(words)
    )
    return program == "vllm" or module


def keep_loadable(value: str) -> str:
    """Return `VLLM_PLUGINS` such that vLLM loads us where the user expects it.

    It matches names exactly, and says nothing of those that match nothing. So a name of ours that
    is misspelt or has a space before it would be ignored in silence; with one name that loads us,
    the others are checked. And on a command line that may hold our options they must exist, even
    where the variable names only others.
    """
    names = [name.strip() for name in value.split(",") if name.strip()]
    loadable = {ALL, OPTIONS_ONLY, *(f"{ALL}.{feature}" for feature in FEATURES)}
    mentioned = any(map(is_ours, names))
    options = is_vllm_command() and any(
        token.startswith(("--plugins", "--scalellm", "--config")) for token in sys.argv
    )
    if loadable & set(value.split(",")) or not (mentioned or options):
        return value
    return ",".join(names if loadable & set(names) else [*names, OPTIONS_ONLY])
