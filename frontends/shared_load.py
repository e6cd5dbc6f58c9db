"""`/load` of the whole server: requests that its workers serve, in either lane."""

from __future__ import annotations

import asyncio
from typing import Any

from .shared_board import Board


class SharedLoad:
    """In place of the number `server_load_metrics`, which vLLM only ever adds to."""

    def __init__(self, board: Board, slot: int) -> None:
        self._board = board
        self._slot = slot
        self._here = 0

    def __iadd__(self, requests: int) -> SharedLoad:
        self._here += requests
        self._board.set_load(self._slot, self._here)
        return self

    def __isub__(self, requests: int) -> SharedLoad:
        self += -requests
        return self


def expose(app: Any, board: Board, slot: int) -> None:
    """Count into the board, and answer `/load` with its sum, in front of vLLM's own route."""
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    def count() -> None:
        app.state.server_load_metrics = SharedLoad(board, slot)

    # vLLM sets it to 0 right after the plugins had their turn, before anything is served.
    asyncio.get_running_loop().call_soon(count)

    async def load(_: Any) -> JSONResponse:
        return JSONResponse({"server_load": board.load()})

    route = Route("/load", load, include_in_schema=False)
    route.methods = {"GET"}
    app.router.routes.insert(0, route)
