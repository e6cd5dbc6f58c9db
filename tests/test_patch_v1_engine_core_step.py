"""The engine's side of kept tokens, on vLLM's own engine class: what ends with a request."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequestType, FinishReason
from vllm.v1.engine.core import EngineCoreProc

from scalellm_plugins.engine.holding import COUNTS, HOLD, KEPT, TAKE_KEPT, TokenHolder, can_wait
from scalellm_plugins.patches import registry
from scalellm_plugins.patches.catalog import PATCHES

from .lane_upstream import wired

pytestmark = pytest.mark.vllm

(PATCH,) = (patch for patch in PATCHES if patch.name == "engine_holds_tokens")


class Scheduler:
    """Notes what is aborted."""

    def __init__(self) -> None:
        self.finished: list[str] = []

    def finish_requests(self, request_ids: Any, _status: Any) -> list[Any]:
        self.finished += request_ids
        return []


class Engine:
    """vLLM's engine with three requests, two steps old: "held" and "other" wait, "read" does not.

    All have a token in each step; those of the first have been sent.
    """

    def __init__(self) -> None:
        self.core: Any = object.__new__(EngineCoreProc)
        self.core.scheduler = Scheduler()
        self.core.output_queue = queue.Queue()
        self.holder = self.core._scalellm_holder = TokenHolder()
        for name, hold in (("held", 0), ("other", 8), ("read", None)):
            extra = None if hold is None else {HOLD: hold}
            params = SimpleNamespace(extra_args=extra)
            self.holder.add(
                SimpleNamespace(request_id=name, client_index=3, sampling_params=params)
            )
        self.step(1.0, "held", "other", "read")
        assert self.step(1.25, "held", "other") is None

    def step(self, at: float, *names: str) -> Any:
        """What is sent to client 3 of a step with a token for each of these."""
        outputs = [EngineCoreOutput(name, [int(at * 100)]) for name in names]
        made = {3: EngineCoreOutputs(outputs=outputs, timestamp=at)}
        self.holder.filter(made, can_wait)
        return made.get(3)

    def sent(self) -> list[tuple[int, Any]]:
        """What was put into the output queue, through vLLM's codec."""
        items = []
        while not self.core.output_queue.empty():
            client, message = self.core.output_queue.get_nowait()
            items.append((client, wired(message)))
        return items


@pytest.fixture
def engine() -> Iterator[Engine]:
    applied = PATCH.name in registry._state.originals
    assert registry.apply(PATCH, strict=True).on
    yield Engine()
    if not applied:
        registry.undo(PATCH)


def fields(message: Any) -> dict[str, Any]:
    """All that a message says but the time at which it was made."""
    said = {name: getattr(message, name) for name in message.__struct_fields__}
    return said | {"timestamp": None}


def test_requests_that_the_engine_aborts_end_with_what_was_kept(engine: Engine) -> None:
    """A pause, or a shutdown: one message, as vLLM's own, and the step that was kept is counted."""
    engine.core._send_abort_outputs_to_client(["read", "held", "new"], 3)
    ((client, message),) = engine.sent()
    assert client == 3
    read, held, new = message.outputs
    assert [one.request_id for one in message.outputs] == ["read", "held", "new"]
    assert {one.finish_reason for one in message.outputs} == {FinishReason.ABORT}
    assert (held.new_token_ids, read.new_token_ids, new.new_token_ids) == ([125], [], [])
    assert held.kv_transfer_params == {KEPT: [1, 1.25, [[2, [[0.25, 2]]], [0, []]]]}
    assert read.kv_transfer_params is new.kv_transfer_params is None
    # What is left is as if there had been no other: its own step alone is still to be counted.
    message = engine.step(1.5, "other", "read")
    assert message.outputs[-1].request_id == COUNTS
    assert message.outputs[-1].kv_transfer_params == {KEPT: [0, 0.0, [[1, [[0.25, 1]]]]]}


def test_without_anything_kept_the_message_is_vllms(engine: Engine) -> None:
    engine.core._send_abort_outputs_to_client(["held"], 3)  # nothing is kept of it after this
    engine.sent()
    engine.core._send_abort_outputs_to_client(["read", "held"], 3)
    EngineCoreProc._send_abort_outputs_to_client.__wrapped__(engine.core, ["read", "held"], 3)  # type: ignore[attr-defined]
    (_, ours), (_, theirs) = engine.sent()
    assert fields(ours) == fields(theirs)


def test_the_message_with_kept_tokens_differs_in_nothing_else(engine: Engine) -> None:
    """It is made here, not by vLLM: a field that a release adds there is missing."""
    EngineCoreProc._send_abort_outputs_to_client.__wrapped__(engine.core, ["read", "held"], 3)  # type: ignore[attr-defined]
    engine.core._send_abort_outputs_to_client(["read", "held"], 3)
    (_, theirs), (_, ours) = engine.sent()
    held = ours.outputs[1]
    held.new_token_ids, held.kv_transfer_params = [], None
    assert fields(ours) == fields(theirs)


def test_an_abort_of_the_frontend_leaves_nothing_behind(engine: Engine) -> None:
    engine.core.abort_requests(["held", "unknown"])
    assert engine.core.scheduler.finished == ["held", "unknown"]
    assert engine.sent() == []
    assert len(engine.holder) == 1, "the other one"


def test_a_frontend_can_ask_for_what_is_kept(engine: Engine) -> None:
    """By a utility call, as through vLLM's client; the requests end with it, so none is late."""
    ask = (3, 77, TAKE_KEPT, (["held", "read", "unknown"],))
    engine.core.shutdown_state = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            EngineCoreProc, "_reject_utility_in_shutdown", lambda *_: False, raising=False
        )
        engine.core._handle_client_request(EngineCoreRequestType.UTILITY, ask)
    ((client, message),) = engine.sent()
    assert client == 3
    answer = message.utility_output
    assert (answer.call_id, answer.failure_message) == (77, None)
    assert answer.result.result == {"held": [125]}
    assert engine.core.scheduler.finished == ["held", "read", "unknown"]
    assert len(engine.holder) == 1
