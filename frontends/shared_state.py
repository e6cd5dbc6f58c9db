"""State of the server that its workers hold in common, made before the first is forked."""

from __future__ import annotations

from .shared_board import Board
from .shared_loras import LoraTable
from .shared_peers import Peers
from .shared_queue import QueueCounts
from .shared_records import Records
from .shared_series import Series

ROOM = 256 << 20
"""Bytes for finished responses: tens of thousands of long ones. Memory is used as it fills."""


class SharedState:
    """What `SlotTable.state` is. Nothing of it has a name in the file system."""

    def __init__(self, slots: int) -> None:
        self.series = [Series() for _ in range(slots)]
        self.board = Board(slots)
        self.loras = LoraTable()
        self.queue = QueueCounts(slots)
        self.records = Records(ROOM)
        self.peers = Peers(slots)

    def clear(self, slot: int) -> None:
        """Forget what a worker that is gone had in hand; what it counted stays. By the supervisor,
        before the slot has another worker."""
        self.series[slot].occupy(0)
        self.board.clear(slot)
        self.queue.clear(slot)
        self.peers.clear(slot)
