"""Putting what all workers share into a worker's application, once vLLM has built it."""

from __future__ import annotations

from typing import Any

from . import shared_metrics
from .worker import current


def attach(app: Any) -> None:
    """Do so where there are workers; a server that is one process stays vLLM's own."""
    worker = current()
    if worker is not None:
        shared_metrics.expose(app, worker.slots.state.series)
