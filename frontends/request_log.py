"""The access log with timings and the request's id, as text or JSON (`frontend.access_log`).

In place of uvicorn's line, which says nothing but the status: one line when a request ends, with
its stages if the fast lane served it. Lines go through uvicorn's logger for this, "uvicorn.access",
so that whatever was configured for it still holds.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.utils import get_client_addr, get_path_with_query_string

if TYPE_CHECKING:
    import logging

FORMATS = ("uvicorn", "text", "json")


class RequestLog:
    """One per worker. `kind`: "text" or "json"."""

    def __init__(self, logger: logging.Logger, kind: str) -> None:
        self._logger = logger
        self._json = kind == "json"
        for handler in logger.handlers:
            # uvicorn's formatter knows only its own line; ours is complete as it is.
            if type(handler.formatter).__name__ == "AccessFormatter":
                handler.setFormatter(None)

    def ended(
        self,
        scope: Any,
        status: int,
        seconds: float,
        *,
        request_id: str | None = None,
        stages: dict[str, float] | None = None,
        tokens: tuple[int, int] | None = None,
    ) -> None:
        """Write one line. `tokens`: of the prompt and of the answer."""
        said: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": get_client_addr(scope),
            "method": scope["method"],
            "path": get_path_with_query_string(scope),
            "status": status,
            "ms": round(seconds * 1e3, 2),
        }
        if request_id is not None:
            said["request_id"] = request_id
        if tokens is not None:
            said["prompt_tokens"], said["completion_tokens"] = tokens
        for stage, value in (stages or {}).items():
            said[f"{stage}_ms"] = round(value * 1e3, 2)
        if self._json:
            self._logger.info("%s", json.dumps(said))
        else:
            self._logger.info("%s", " ".join(f"{name}={value}" for name, value in said.items()))
