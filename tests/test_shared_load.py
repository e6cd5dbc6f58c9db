"""`/load`: vLLM's additions and the fast lane's, over all workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from scalellm_plugins.frontends.shared_board import Board
from scalellm_plugins.frontends.shared_load import SharedLoad


def test_what_vllm_adds_is_summed_over_workers() -> None:
    board = Board(2)
    states = [SimpleNamespace(load=SharedLoad(board, slot)) for slot in range(2)]
    states[0].load += 1
    states[1].load += 1
    states[1].load += 1
    assert board.load() == 3
    states[1].load -= 1
    assert board.load() == 2


@pytest.mark.vllm
@pytest.mark.parametrize("tracked", [True, False])
def test_the_fast_lane_counts_each_request_once(tracked: bool) -> None:
    """In a server of one process, too, where vLLM's own number is counted."""
    from scalellm_plugins.frontends.accounting import Accounting

    state = SimpleNamespace(enable_server_load_tracking=tracked, server_load_metrics=0)
    accounting = Accounting(SimpleNamespace(state=state))
    answer: Any = object()
    accounting.entered(answer)
    assert state.server_load_metrics == int(tracked)
    accounting.left(answer)
    accounting.left(answer)  # its client goes away at the same moment
    accounting.left(object())  # type: ignore[arg-type] # it never entered
    assert state.server_load_metrics == 0
