"""Putting what all workers share into a worker's application, once vLLM has built it."""

from __future__ import annotations

from typing import Any

from . import shared_load, shared_metrics, shared_queue, shared_responses
from .worker import current


async def attach(engine_client: Any, app: Any, app_state: Any) -> None:
    """Do so where there are workers; a server that is one process stays vLLM's own.

    Called before gate and fast lane, which remember what is changed here.
    """
    worker = current()
    if worker is None:
        return
    state = worker.slots.state
    shared_metrics.expose(app, state.series)
    shared_load.expose(app, state.board, worker.index)
    shared_queue.install(engine_client, state.queue, worker.index)
    responses = await shared_responses.install(app_state, state.records, state.peers, worker.index)
    if responses is not None:
        worker.unfinished = responses.running
