"""How long prompts and outputs are: distributions by a short text. Pure.

512                        always
uniform:100-500            between the two, both included
lognormal:median=1020:sigma=0.5:max=8192
sharegpt                   a preset, see `PRESETS`
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from scalellm_plugins.errors import ConfigError, closest_first

LONGEST = 131_072
"""Tokens; where a lognormal's tail is cut unless it has a `max` of its own."""

Side = Literal["prompt", "output"]


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens; see the module for its text."""

    median: float
    sigma: float = 0.0
    """Of the logarithm; 0: always the median."""
    low: int = 1
    high: int = LONGEST
    uniform: bool = False
    """Between `low` and `high`."""

    def draw(self, dice: random.Random) -> int:
        """Return a length of at least one token."""
        if self.uniform:
            return dice.randint(self.low, self.high)
        if not self.sigma:
            return round(self.median)
        drawn = round(self.median * math.exp(self.sigma * dice.gauss(0.0, 1.0)))
        return min(max(drawn, self.low), self.high)

    @property
    def longest(self) -> int:
        """No length is more."""
        return self.high if self.sigma or self.uniform else round(self.median)


def _of_mean(mean: float, sigma: float, high: int) -> Lengths:
    return Lengths(mean * math.exp(-sigma * sigma / 2), sigma, high=high)


PRESETS: dict[str, dict[Side, Lengths]] = {
    # Means as in Kwon et al., "Efficient Memory Management for Large Language Model Serving with
    # PagedAttention" (SOSP 2023), figure 11; the lognormal shape and its width are ours.
    "sharegpt": {"prompt": _of_mean(161.3, 1.2, 2048), "output": _of_mean(338.0, 0.9, 2048)},
    "alpaca": {"prompt": _of_mean(19.3, 0.6, 512), "output": _of_mean(58.5, 0.9, 1024)},
    # Medians as in Patel et al., "Splitwise" (ISCA 2024), section III, of Azure's traces; the
    # lognormal shape and its width are ours.
    "azure-conv": {
        "prompt": Lengths(1020, 0.7, high=16_384),
        "output": Lengths(129, 0.9, high=1024),
    },
    "azure-code": {
        "prompt": Lengths(1500, 0.8, high=16_384),
        "output": Lengths(13, 1.2, high=1024),
    },
}
"""Named pairs of distributions."""

_FORMS = "a number, uniform:LOW-HIGH, lognormal:median=M:sigma=S[:min=A][:max=B]"


def parse(text: str, side: Side, option: str) -> Lengths:
    """Make a distribution from its text; `side` says which half of a preset is meant.

    Raises:
        ConfigError: not one of the forms; the text names `option`.
    """
    text = text.strip()
    if text in PRESETS:
        return PRESETS[text][side]
    kind, _, rest = text.partition(":")
    try:
        if kind == "uniform":
            low, _, high = rest.partition("-")
            return _checked(Lengths(0.0, low=int(low), high=int(high), uniform=True))
        if kind == "lognormal":
            return _checked(_lognormal(rest))
        return _checked(Lengths(float(int(text))))
    except (ValueError, KeyError):
        names = ", ".join(closest_first(text, PRESETS))
        raise ConfigError(
            f"{option}: {text!r} is no length in tokens. Valid: {_FORMS}, or a preset: {names}"
        ) from None


def _lognormal(rest: str) -> Lengths:
    given = dict(part.split("=", 1) for part in rest.split(":"))
    if not given.keys() <= {"median", "sigma", "min", "max"}:
        raise ValueError(rest)
    low, high = int(given.get("min", 1)), int(given.get("max", LONGEST))
    return Lengths(float(given["median"]), float(given["sigma"]), low, high)


def _checked(lengths: Lengths) -> Lengths:
    middle = lengths.low if lengths.uniform else lengths.median
    fine = (
        1 <= middle <= LONGEST
        and 1 <= lengths.low <= lengths.high <= LONGEST
        and 0 <= lengths.sigma <= 10
    )
    if not fine:  # NaN included
        raise ValueError(lengths)
    return lengths
