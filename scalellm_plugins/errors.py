"""What a user did, as exceptions: each names the value, the option and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ScaleLLMError(Exception):
    """Base of everything this package raises at its users."""


class ConfigError(ScaleLLMError, ValueError):
    """An option that cannot be: unknown key, wrong type or a value out of range."""


class UnknownPluginError(ConfigError):
    """A name in `--plugins` that no installed plugin and no feature has."""


class TermError(ScaleLLMError, ValueError):
    """What a request says about its scheduling cannot be; `field` is where it says so."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class ContractError(ScaleLLMError):
    """The installed vLLM does not look the way a patch needs; raised only under `strict`."""


class CheckpointError(ScaleLLMError):
    """A model's files are missing, damaged, contradict each other or are of an unknown kind."""


class OutputError(ScaleLLMError):
    """What was asked for cannot be written, such as on a full disk."""


class UnsupportedVLLMError(ScaleLLMError):
    """There is no vLLM here, or one outside the supported range."""


def closest_first(value: str, valid: Iterable[str]) -> list[str]:
    """Return `valid` sorted so that the names most like `value` come first.

    Similarity is difflib's ratio on lower case; ties keep alphabetical order.
    """
    lowered = value.lower()
    return sorted(
        sorted(valid),
        key=lambda name: -difflib.SequenceMatcher(None, lowered, name.lower()).ratio(),
    )
