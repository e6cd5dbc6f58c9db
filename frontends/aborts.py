"""Requests that vLLM ends on the frontend's side: their clients get what the engine keeps of them.

`AsyncLLM.abort` ends an answer with the text that has arrived. Of an answer whose tokens the engine
keeps (`engine/holding.py`) up to half a second's are missing then, so they are asked for first. (A
pause and a shutdown end requests in the engine, which sends what it keeps by itself.)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

from scalellm_plugins.engine.holding import TAKE_KEPT

from .answers import Answer

logger = logging.getLogger("vllm.scalellm")

ANSWER_S = 1.0
"""How long an abort waits for the engine, which may be within a long step."""


def install(engine_client: Any) -> None:
    """Have an engine client (an `AsyncLLM`) ask for what is kept before it aborts."""
    abort = engine_client.abort
    processor = engine_client.output_processor

    async def abort_with_all(request_id: str | Iterable[str], internal: bool = False) -> None:
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        known = ids
        if not internal:
            known = [one for id_ in ids for one in processor.external_req_ids.get(id_, ())]
        held = [id_ for id_ in known if _may_be_kept(processor.request_states.get(id_))]
        if held:
            try:
                await _fetch(engine_client, held)
            except Exception as error:  # the engine is busy or dead: then without
                logger.warning("what the engine keeps of aborted requests is lost: %r", error)
        await abort(ids, internal)

    engine_client.abort = abort_with_all


def _may_be_kept(answer: Any) -> bool:
    return isinstance(answer, Answer) and answer.hold is not None and not answer.is_prefilling


async def _fetch(engine_client: Any, request_ids: list[str]) -> None:
    """End requests in the engine and give their answers what was kept."""
    core = engine_client.engine_core
    async with asyncio.timeout(ANSWER_S):
        taken = await asyncio.gather(
            *(
                core._call_utility_async(TAKE_KEPT, request_ids, engine=engine)
                for engine in core.core_engines
            )
        )
    states = engine_client.output_processor.request_states
    for kept in taken:
        for request_id, token_ids in kept.items():
            answer = states.get(request_id)
            if isinstance(answer, Answer):  # its client may have left meanwhile
                answer.advance(token_ids, stopped=False)
