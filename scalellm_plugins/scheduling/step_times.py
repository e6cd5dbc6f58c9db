"""How long a step of the engine takes, learnt from those that went by. Pure.

(This is the interface; see `observe` and `predict`.)
"""

# ruff: noqa: ARG002

from __future__ import annotations


class StepTimes:
    """A model of the step's duration by what is in it."""

    def observe(self, prefill: int, decodes: int, context: int, seconds: float) -> None:
        """A step with `prefill` tokens of prompts and `decodes` sequences of `context` tokens in
        all took so long."""

    def predict(self, prefill: int, decodes: int, context: int) -> float:
        """Return how long such a step will take, s; 0 while nothing is known."""
        return 0.0
