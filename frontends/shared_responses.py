"""The Responses API over all workers: whichever is asked knows a response, or who does.

A response that is finished goes, with the messages before it, into records that all workers share:
any of them answers for it or continues it, also when the worker that made it is gone. One that is
still being made is the business of its worker, which the others ask. The records are bounded; the
oldest responses are forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .shared_peers import Peers
from .shared_records import Records

logger = logging.getLogger("vllm.scalellm")

_PATIENCE_S = 10.0
"""How long a worker may take to say whether it has a response: its loop may be busy, or stuck."""

_RUNNING = ("queued", "in_progress")


class SharedResponses:
    """One worker's part. `serving`: vLLM's `OpenAIServingResponses`, whose methods are wrapped."""

    def __init__(self, serving: Any, records: Records, peers: Peers, slot: int) -> None:
        self._serving = serving
        self._records = records
        self._peers = peers
        self._slot = slot
        self._retrieve = serving.retrieve_responses
        self._cancel = serving.cancel_responses
        self._create = serving.create_responses
        serving.response_store = _Responses(self)
        serving.msg_store = _Messages(self)
        serving.retrieve_responses = self.retrieve
        serving.cancel_responses = self.cancel
        serving.create_responses = self.create

    # What vLLM's stores are asked

    def finished(self, response_id: str) -> tuple[Any, Any] | None:
        """Return response and messages, if any worker has finished it (and it is remembered)."""
        data = self._records.get(response_id.encode())
        return None if data is None else pickle.loads(data)

    def store(self, response: Any, messages: Any) -> None:
        """Remember a response for all workers, if it is finished."""
        if response.status in _RUNNING:
            return
        try:
            data = pickle.dumps((response, messages))
        except Exception as error:
            logger.warning("response %s stays with its API server: %s", response.id, error)
            return
        if not self._records.put(response.id.encode(), data):
            logger.warning(
                "response %s (%d bytes) is too large for other API servers", response.id, len(data)
            )

    def _is_finished(self, response_id: str) -> bool:
        return self._records.get(response_id.encode()) is not None

    def _is_ours(self, response_id: str) -> bool:
        return dict.__contains__(self._serving.response_store, response_id)

    # What clients ask

    async def retrieve(
        self, response_id: str, starting_after: int | None, stream: bool | None
    ) -> Any:
        """See vLLM's `retrieve_responses`."""
        owner = None
        if not self._is_ours(response_id) and (stream or not self._is_finished(response_id)):
            owner = await self._owner(response_id)
        if owner is not None and stream:
            return self._peers.ask(owner, ("events", response_id, starting_after))
        answer = None if owner is None else await self._first(owner, ("retrieve", response_id))
        if answer is not None:
            return answer
        return await self._retrieve(response_id, starting_after=starting_after, stream=stream)

    async def cancel(self, response_id: str) -> Any:
        """See vLLM's `cancel_responses`."""
        if not self._is_ours(response_id) and not self._is_finished(response_id):
            owner = await self._owner(response_id)
            if owner is not None:
                answer = await self._first(owner, ("cancel", response_id))
                if answer is not None:
                    return answer
        return await self._cancel(response_id)

    async def create(self, request: Any, raw_request: Any = None) -> Any:
        """See vLLM's `create_responses`; what it continues may be unfinished elsewhere."""
        answer = await self._continue(request, raw_request)
        task = self._serving.background_tasks.get(request.request_id)
        if task is not None:
            # It may fail or be cancelled: then vLLM changes what it has stored, in place.
            task.add_done_callback(lambda _: self._settle(request.request_id))
        return answer

    def _settle(self, response_id: str) -> None:
        response = dict.get(self._serving.response_store, response_id)
        if response is not None:
            self.store(response, dict.get(self._serving.msg_store, response_id))

    async def _continue(self, request: Any, raw_request: Any) -> Any:
        before = request.previous_response_id
        if before is None or self._is_ours(before) or self._is_finished(before):
            return await self._create(request, raw_request)
        owner = await self._owner(before)
        found = owner is not None and await self._first(owner, ("fetch", before))
        if found:
            # For the time that vLLM looks; what becomes of it is its own worker's to say.
            dict.__setitem__(self._serving.response_store, before, found[0])
            dict.__setitem__(self._serving.msg_store, before, found[1])
        try:
            return await self._create(request, raw_request)
        finally:
            if found:
                dict.pop(self._serving.response_store, before, None)
                dict.pop(self._serving.msg_store, before, None)

    # Between workers

    async def _owner(self, response_id: str) -> int | None:
        """Return the slot whose worker has a response; a handful of them are asked in turn."""
        for slot in self._peers.others(self._slot):
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    if await self._first(slot, ("owns", response_id)):
                        return slot
        return None

    async def _first(self, slot: int, question: Any) -> Any:
        async for answer in self._peers.ask(slot, question):
            return answer
        return None

    async def answer(self, question: Any) -> Any:
        """Answer another worker."""
        kind, response_id, *more = question
        if kind == "owns":
            return self._is_ours(response_id)
        if not self._is_ours(response_id):
            return None
        if kind == "events":
            return await self._retrieve(response_id, starting_after=more[0], stream=True)
        if kind == "retrieve":
            return await self._retrieve(response_id, starting_after=None, stream=False)
        if kind == "cancel":
            return await self._cancel(response_id)
        assert kind == "fetch", kind
        responses, messages = self._serving.response_store, self._serving.msg_store
        return dict.get(responses, response_id), dict.get(messages, response_id)

    def running(self) -> int:
        """How many responses are being made in the background, for nobody's connection."""
        return len(self._serving.background_tasks)


class _Responses(dict[str, Any]):
    """vLLM's `response_store`."""

    def __init__(self, shared: SharedResponses) -> None:
        super().__init__(shared._serving.response_store)
        self._shared = shared

    def __setitem__(self, response_id: str, response: Any) -> None:
        super().__setitem__(response_id, response)
        self._shared.store(response, dict.get(self._shared._serving.msg_store, response_id))

    def get(self, response_id: str, default: Any = None) -> Any:
        """See dict."""
        return _get(self, self._shared.finished, response_id, 0, default)


class _Messages(dict[str, Any]):
    """vLLM's `msg_store`."""

    def __init__(self, shared: SharedResponses) -> None:
        super().__init__(shared._serving.msg_store)
        self._shared = shared

    def __missing__(self, response_id: str) -> Any:
        found = self._shared.finished(response_id)
        if found is None or found[1] is None:
            raise KeyError(response_id)
        return found[1]

    def get(self, response_id: str, default: Any = None) -> Any:
        """See dict."""
        return _get(self, self._shared.finished, response_id, 1, default)


def _get(
    store: dict[str, Any], finished: Callable[[str], Any], response_id: str, part: int, default: Any
) -> Any:
    if dict.__contains__(store, response_id):
        return dict.__getitem__(store, response_id)
    found = finished(response_id)
    return default if found is None else found[part]


async def install(state: Any, records: Records, peers: Peers, slot: int) -> SharedResponses | None:
    """Share the responses of an application, if it has a store for them."""
    serving = getattr(state, "openai_serving_responses", None)
    if serving is None or not serving.enable_store:
        return None
    shared = SharedResponses(serving, records, peers, slot)
    await peers.listen(slot, shared.answer)
    return shared
