"""A step's outputs for one client as the lean step has them: one token each, by column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class PlainOutputs:
    """In the place of the list in `EngineCoreOutputs.outputs`, where an `Outbox` takes it.

    Args:
        ids: of requests with one new token and nothing else to say.
        tokens: theirs.
        others: vLLM's outputs of other requests.
        make: makes vLLM's output of (request id, [token]).
    """

    __slots__ = ("_make", "ids", "others", "tokens")

    def __init__(
        self, ids: list[str], tokens: list[int], others: list[Any], make: Callable[..., Any]
    ) -> None:
        self.ids = ids
        self.tokens = tokens
        self.others = others
        self._make = make

    def whole(self) -> list[Any]:
        """All of them as vLLM's outputs."""
        make = self._make
        made = [make(id_, [token]) for id_, token in zip(self.ids, self.tokens, strict=True)]
        return made + self.others


def whole(outputs: Any) -> list[Any]:
    """What vLLM would have in `EngineCoreOutputs.outputs`."""
    return outputs.whole() if type(outputs) is PlainOutputs else outputs
