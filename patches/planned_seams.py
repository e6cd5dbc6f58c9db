"""Seams of features that are not built yet: watched, so that they can be built.

A break of a planned feature's switches nothing off that exists today; `scalellm doctor` reports it,
and fails on it only under `--strict`. Pure data, like `seams.py`. There are none at the moment.
"""

from __future__ import annotations

from .seams import Seam

PLANNED: tuple[Seam, ...] = ()
