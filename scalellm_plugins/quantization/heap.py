"""Freed memory that the C library keeps, handed back to the system."""

from __future__ import annotations

import contextlib
import ctypes

SMALLEST = 1 << 20
"""Weights of a layer from which on it is worth the call, some milliseconds."""


def trim() -> None:
    """Hand back whole pages that are free, also those between blocks in use.

    glibc does so by itself at the heap's end only. Packing a layer frees its copy in integers from
    below the packed weight, and the next layer's copy, aligned, does not fit the gap: every gap
    stayed, and 8 bits held as much memory as bf16. Without glibc, or under another allocator that
    was preloaded, nothing happens.
    """
    with contextlib.suppress(AttributeError):  # musl, for one, has no such call
        ctypes.CDLL(None).malloc_trim(0)
