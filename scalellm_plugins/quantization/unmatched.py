"""Patterns of `skip` and `keep_8bit` that match nothing, and what would have matched. Pure.

A misspelt pattern would else quantize what was to be left alone, and nobody would know.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scalellm_plugins.config import QuantizationConfig
from scalellm_plugins.errors import closest_first

from .rules import matches, patterns

_SHOWN = 4
"""Names of layers in a message: one of each kind, those most like the pattern."""

_NUMBER = re.compile(r"\.\d+(?=\.)")
"""A layer's number in its name: the first one."""


@dataclass
class Seen:
    """Names of a model's layers, in the order in which it makes them.

    `plain` are never rounded by `keep_8bit`, but one may well say that they are to be left alone:
    embeddings, the output layer, experts.
    """

    linear: dict[str, None] = field(default_factory=dict)
    plain: dict[str, None] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*self.linear, *self.plain]

    def add(self, names: Iterable[str], *, linear: bool) -> None:
        """Remember a layer by each of its names. Some models give embeddings none."""
        (self.linear if linear else self.plain).update(dict.fromkeys(filter(None, names)))


def unmatched(
    options: QuantizationConfig, seen: Seen, *, layers: int = 0, others: Sequence[str] = ()
) -> list[str]:
    """One text for each pattern that matches no layer.

    `layers`: this process has made only some of the model's layers, of which there are so many
    (a stage of a pipeline). The others are taken to be like those that it has. `others` are names
    that may be matched, too, and are not shown.
    """
    asked = (("skip", options.skip, seen.names), ("keep_8bit", options.keep_8bit, [*seen.linear]))
    texts = []
    for option, text, names in asked:
        known = [*names, *_elsewhere(names, layers), *others]
        texts += [
            _text(option, glob, names) for glob in patterns(text) if not matches(known, [glob])
        ]
    return texts


def _elsewhere(names: Iterable[str], layers: int) -> Iterable[str]:
    kinds = dict.fromkeys(_NUMBER.sub(".{}", name, count=1) for name in names)
    return (kind.format(number) for kind in kinds if "{}" in kind for number in range(layers))


def _text(option: str, glob: str, names: Sequence[str]) -> str:
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], name)
    near = closest_first(glob.rpartition(".")[2].strip("*"), kinds)
    found = _suggestion(glob, names, kinds)
    hint = f"Did you mean {found!r}? " if found else ""
    return (
        f"scalellm.quantization.{option}: {glob!r} matches no layer that could be quantized. "
        f"{hint}Layers here: {', '.join(kinds[kind] for kind in near[:_SHOWN]) or 'none'}, ..."
    )


def _suggestion(glob: str, names: Sequence[str], kinds: Iterable[str]) -> str:
    """The first of some patterns like this one that matches: a star is missing, or a letter."""
    stem, dot, last = glob.rpartition(".")
    trials = [f"*.{glob}", f"{glob}.*", f"*.{glob}.*"]
    for kind in difflib.get_close_matches(last, kinds, 1):
        trials += [f"{stem}{dot}{kind}", f"*.{kind}"]
    return next((trial for trial in trials if matches(names, [trial])), "")
