"""What the engine refuses or gives up, told to its client with a status of HTTP.

The engine ends such a request with an error that names the status (`scheduling/refused.py`). While
nothing was sent, the client gets that status and OpenAI's error document; later, in a stream, an
event with the same error, where vLLM sends one for its own. The fast lane does so itself (lane.py,
answers.py). In vLLM's own code the engine client's `generate` raises an exception of vLLM's, and
the headers of a stream wait a moment for its first event (`Held`), as they do in the fast lane.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Mapping
from http import HTTPStatus
from typing import Any

import prometheus_client

from scalellm_plugins.scheduling.refused import Refused
from scalellm_plugins.scheduling.terms import DEADLINE, TTFT

from .limits import SHORTEST_RETRY_S, error_body
from .metric import metric

HEADERS_S = 0.05
"""How long the headers of a stream wait for its first event."""

LONGEST_HEADERS_S = 30.0
"""… at most, where the request has a deadline: proxies wait for 60 s and more."""

_GRACE_S = 0.5
"""After a deadline, until the engine's word is here."""


def headers_wait(terms: Mapping[str, Any] | None) -> float:
    """Return how long (s) the headers of a stream wait for its first event.

    The engine may drop a request until its deadline has passed: with a status, if the headers are
    still here. A client that has named one has nothing to read before then, either.
    """
    times = [terms[name] / 1e3 for name in (DEADLINE, TTFT) if name in terms] if terms else []
    if not times:
        return HEADERS_S
    return float(min(max(times) + _GRACE_S, LONGEST_HEADERS_S))


def retry_headers(refused: Refused) -> list[tuple[bytes, bytes]]:
    """Return headers that say whether to try again.

    OpenAI's clients do so by themselves after 429 and 5xx, but for `x-should-retry: false`: what
    came too late once is not worth a second try.
    """
    if refused.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        seconds = refused.retry_after_s
        return [(b"retry-after", b"%d" % (SHORTEST_RETRY_S if seconds is None else seconds))]
    return [(b"x-should-retry", b"false")]


@functools.cache
def _exception() -> type[Exception]:
    from vllm.exceptions import GenerationError, GracefulHTTPError

    class EngineRefusal(GracefulHTTPError, GenerationError):  # type: ignore[misc]
        """Both: the one has a status of its own, the other is no reason for a trace in the log."""

        def __init__(self, refused: Refused) -> None:
            status = HTTPStatus(refused.status)
            super().__init__(refused.message, status)
            self.status_code = status
            self.refused = refused

    return EngineRefusal


@functools.cache
def _counter() -> Any:
    return metric(
        prometheus_client.Counter,
        "scalellm:engine_refusals",
        "Requests that the engine refused or gave up, by the status that their clients got or, in "
        "a stream that had begun, would have got",
        ("status",),
    )


def exception(refused: Refused) -> Exception:
    """Count a refusal; return it as an exception that vLLM's code answers with its status."""
    _counter().labels(refused.status).inc()
    return _exception()(refused)


def refused_by(error: BaseException | None) -> Refused | None:
    """Return what was refused if an exception is of `exception`'s making."""
    return getattr(error, "refused", None)


async def until_refused(outputs: Any, held: Held | None) -> AsyncGenerator[Any, None]:
    """Pass on what the engine client generates; raise when the engine has refused the request."""
    try:
        async for output in outputs:
            for one in output.outputs:
                if one.finish_reason != "error":
                    continue
                refused = Refused.of(one.stop_reason)
                if refused is not None:
                    if held is not None:
                        held.refused = refused
                    raise exception(refused)
            yield output
    finally:
        await outputs.aclose()


def tell_in_streams(state: Any) -> None:
    """Have vLLM's handlers give such an error its own type in their streams, and not a 500's.

    `state`: an application's; its handlers are wrapped one by one, as objects. Responses have
    events of their own (client_errors.py).
    """
    for name, handler in list(vars(state).get("_state", {}).items()):
        known = hasattr(handler, "_convert_generation_error_to_streaming_response")
        if known and name != "openai_serving_responses":
            _wrap(handler)


def _wrap(handler: Any) -> None:
    convert = handler._convert_generation_error_to_streaming_response

    def converted(error: Any) -> Any:
        if refused_by(error) is not None:
            return handler.create_streaming_error_response(error)
        return convert(error)

    handler._convert_generation_error_to_streaming_response = converted


class Held:
    """An application's `send`, whose stream may still turn out to have been refused."""

    def __init__(self, send: Any, *, anthropic: bool) -> None:
        self._send = send
        self._anthropic = anthropic
        self._start: Any = None
        self._late: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._replaced = False
        self.refused: Refused | None = None
        """What the engine has refused of this request, as soon as that is known."""
        self.wait_s = HEADERS_S

    async def __call__(self, message: Any) -> None:
        """Send a message; the first of a stream when the next one comes, or in a while."""
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            if self.refused is not None:
                await self._replace(message)
            elif _is_stream(message):
                self._start = message
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(self.wait_s, self._send_late)
            else:
                await self._send(message)
            return
        if self._late is not None:
            late, self._late = self._late, None
            await late
        start, self._start = self._start, None
        if start is not None:
            self.close()
            if self.refused is not None:
                await self._replace(start)
                return
            await self._send(start)
        await self._send(message)

    def close(self) -> None:
        """Send nothing any more of one's own accord."""
        self._start = None
        if self._timer is not None:
            self._timer.cancel()

    def _send_late(self) -> None:
        start, self._start = self._start, None
        if start is not None:
            self._late = asyncio.get_running_loop().create_task(self._send(start))

    async def _replace(self, start: Any) -> None:
        assert self.refused is not None
        self._replaced = True
        refused = self.refused
        body = error_body(refused.status, refused.message, anthropic=self._anthropic)
        dropped = {b"content-type", b"content-length", b"transfer-encoding"}
        headers = [pair for pair in start["headers"] if pair[0].lower() not in dropped]
        headers += [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            *retry_headers(refused),
        ]
        await self._send({**start, "status": refused.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _is_stream(start: Any) -> bool:
    return any(
        name == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start["headers"]
    )
