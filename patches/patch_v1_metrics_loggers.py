"""The loggers of a worker's statistics speak for all workers.

Symptom without it: with several API servers no statistics line is logged, and the scheduler's
gauges show what the slowest of them heard last.
"""

from __future__ import annotations

from typing import Any

from .registry import replace


def apply() -> None:
    """Wrap the constructor of vLLM's manager; outside a supervised worker nothing changes."""
    from vllm.v1.metrics import loggers

    original = loggers.StatLoggerManager.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from scalellm_plugins.frontends import shared_log, shared_values
        from scalellm_plugins.frontends.worker import current

        worker = current()
        if worker is None:
            original(self, *args, **kwargs)
            return
        # With more than one client vLLM leaves its logging logger out.
        original(self, *args, **{**kwargs, "client_count": 1})
        clock = shared_values.clock
        shared_log.share(self, worker.slots.state.board, worker.index, lambda: clock.sent)
        self.record = clock.during(self.record)

    replace(loggers.StatLoggerManager, "__init__", __init__)
