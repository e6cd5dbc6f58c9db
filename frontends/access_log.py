"""uvicorn's access log, written once per moment instead of once per request.

`logging` makes a record, formats, locks, writes and flushes for each line: 40-60 µs, as much as the
rest of a request's way to the engine. Where the log is uvicorn's own kind (a plain stream, no
filters, no time in the line), a line is learnt from the handler's formatter once per kind of
request, and lines are written together. Anything else goes through `logging`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.utils import get_client_addr, get_path_with_query_string

_FORMAT = '%s - "%s %s HTTP/%s" %d'  # uvicorn's
_MARK = "scalellm-mark-client"
_LOOKED_AT = ("method", "root_path", "path", "query_string", "http_version")
_EVERY_S = 0.05
_KINDS = 256


class AccessLog:
    """One per worker; `logger` is uvicorn's."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._handler = _plain_handler(logger)
        self._kinds: dict[tuple[Any, ...], tuple[str, str]] = {}
        self._lines: list[str] = []

    def write(self, scope: Any, status: int) -> None:
        """Note that an answer to the request in `scope` begins."""
        client = get_client_addr(scope)
        if self._handler is None:
            self._logger.info(_FORMAT, client, *_rest(scope, status))
            return
        # By what `_rest` looks at: quoting the path takes longer than all else here.
        seen = (*map(scope.get, _LOOKED_AT), status)
        kind = self._kinds.get(seen)
        if kind is None:
            kind = self._learn(seen, _rest(scope, status))
        if not self._lines:
            asyncio.get_running_loop().call_later(_EVERY_S, self.flush)
        self._lines.append(kind[0] + client + kind[1])

    def _learn(self, seen: tuple[Any, ...], rest: tuple[Any, ...]) -> tuple[str, str]:
        assert self._handler is not None
        record = self._logger.makeRecord(
            self._logger.name, logging.INFO, "", 0, _FORMAT, (_MARK, *rest), None
        )
        before, _, after = self._handler.format(record).partition(_MARK)
        kind = before, after + self._handler.terminator
        if len(self._kinds) >= _KINDS:
            self._kinds.clear()  # paths with queries may be any number
        self._kinds[seen] = kind
        return kind

    def flush(self) -> None:
        """Write the lines that wait."""
        lines, self._lines = self._lines, []
        handler = self._handler
        if handler is None or not lines:
            return
        with handler.lock or _NoLock():
            handler.stream.write("".join(lines))
            handler.flush()


def _rest(scope: Any, status: int) -> tuple[Any, ...]:
    """What a line says, but for the client."""
    return scope["method"], get_path_with_query_string(scope), scope["http_version"], status


class _NoLock:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_args: object) -> None:
        return None


def _plain_handler(logger: logging.Logger) -> logging.StreamHandler[Any] | None:
    """The one handler of a log that is as uvicorn sets it up, else None."""
    handlers = list(logger.handlers)
    upper = logger
    while upper.propagate and upper.parent is not None:
        upper = upper.parent
        handlers += upper.handlers
    if len(handlers) != 1 or logger.filters or not logger.isEnabledFor(logging.INFO):
        return None
    handler: Any = handlers[0]
    plain = type(handler) is logging.StreamHandler and not handler.filters
    formatter = handler.formatter
    if not plain or formatter is None or formatter.usesTime() or handler.level > logging.INFO:
        return None
    plain_handler: logging.StreamHandler[Any] = handler
    return plain_handler
