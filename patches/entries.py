"""What a patch is, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .seams import Entry

When = Literal["cli", "process", "serve", "worker", "engine"]
"""While the command line is built; in every vLLM process, once it loads its plugins; in the process
of `vllm serve`, once its command line is parsed; in the supervisor, for the workers forked from it;
in the process of an engine, once it loads its plugins."""


@dataclass(frozen=True, kw_only=True)
class Patch(Entry):
    """One change to vLLM at run time. `module` is its file here, with an idempotent `apply()`.

    `composes`: the patch only adds around what it wraps, so that another plugin's wrapper of the
    same target may lie below it; otherwise such a target is a broken contract.
    """

    module: str
    how: str
    when: When
    remove_when: str
    composes: bool = False
