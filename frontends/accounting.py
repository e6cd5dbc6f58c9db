"""What is said about requests of the fast lane: vLLM's HTTP metrics, our own, the access log."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import prometheus_client
from starlette.requests import Request
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from .access_log import AccessLog
from .metric import metric
from .request_log import RequestLog

if TYPE_CHECKING:
    from .answers import Answer


class _Response:
    """As much of a response as the instrumentation of vLLM's HTTP metrics looks at."""

    def __init__(self, length: int | None) -> None:
        self.headers = {} if length is None else {"Content-Length": str(length)}


class Accounting:
    """One per worker. `app`: vLLM's FastAPI application."""

    def __init__(self, app: Any, access_log: str = "uvicorn") -> None:
        self._app = app
        self._log_kind = access_log
        self._request_log: RequestLog | None = None
        self._instrumentations: list[Any] | None = None
        self._requests = metric(
            prometheus_client.Counter,
            "scalellm:requests",
            "HTTP requests of the hot routes by lane",
            ("lane", "route"),
        )
        self._proxied: Any = None
        self._log: AccessLog | None = None
        self._counters: dict[tuple[str, bool], Any] = {}
        self._exchanges: dict[tuple[Any, str, int], Any] = {}
        self._in_engine: set[Answer] = set()

    def entered(self, answer: Answer) -> None:
        """Count a request that the engine has, for `/load`, where that is tracked."""
        state = self._app.state
        if getattr(state, "enable_server_load_tracking", False):
            state.server_load_metrics += 1
            self._in_engine.add(answer)

    def left(self, answer: Answer) -> None:
        """Its exchange is over. May be called too often."""
        if answer in self._in_engine:
            self._in_engine.remove(answer)
            self._app.state.server_load_metrics -= 1

    def routed(self, route: str, *, fast: bool) -> None:
        """Count a request by the lane that serves it."""
        key = (route, fast)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._requests.labels("fast" if fast else "full", route)
            self._counters[key] = counter
        counter.inc()

    def started(self, cycle: Any, status: int) -> None:
        """Write uvicorn's line of the access log, as it does when an answer starts."""
        if not cycle.access_log or self._log_kind != "uvicorn":
            return
        self._resolve_proxy(cycle.scope)
        if self._log is None:
            self._log = AccessLog(cycle.access_logger)
        self._log.write(cycle.scope, status)

    def _resolve_proxy(self, scope: Any) -> None:
        """Let uvicorn's middleware put the client's address into the scope, if it trusts it."""
        if not any(name.startswith(b"x-forwarded-") for name, _ in scope["headers"]):
            return
        if self._proxied is None:
            config = self._app.state.server.config
            self._proxied = config.proxy_headers and ProxyHeadersMiddleware(
                _nothing, trusted_hosts=config.forwarded_allow_ips
            )
        if self._proxied:
            with suppress(StopIteration):
                self._proxied(scope, None, None).send(None)

    @property
    def own_log(self) -> bool:
        """Whether the access log is ours, written when requests end."""
        return self._log_kind != "uvicorn"

    def log(self, scope: Any, status: int, seconds: float, **more: Any) -> None:
        """Write our access log's line for a request that ended."""
        self._resolve_proxy(scope)
        if self._request_log is None:
            self._request_log = RequestLog(logging.getLogger("uvicorn.access"), self._log_kind)
        self._request_log.ended(scope, status, seconds, **more)

    def logged(self, app: Any) -> Any:
        """Return an application that answers as `app` does and is logged by us."""

        async def answering(scope: Any, receive: Any, send: Any) -> None:
            begun = time.monotonic()
            status = 500

            async def noting(message: Any) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, noting)
            finally:
                self.log(scope, status, time.monotonic() - begun)

        return answering

    def ended(self, answer: Answer, status: int, seconds: float) -> None:
        """Count the exchange in vLLM's HTTP metrics (`http_requests_total` and so on)."""
        if self._instrumentations is None:
            self._instrumentations = _instrumentations(self._app)
        for instrumentation in self._instrumentations:
            key = (instrumentation, answer.ask.route.path, status)
            exchange = self._exchanges.get(key)
            if exchange is None:
                exchange = _Exchange.learn(*key) or _Slow(*key)
                self._exchanges[key] = exchange
            exchange.count(answer, seconds)


class _Exchange:
    """The series of the instrumentation's own metrics for one route and status, looked up once."""

    def __init__(self, *series: Any) -> None:
        self._total, self._in, self._out, self._fine, self._coarse = series

    @classmethod
    def learn(cls, instrumentation: Any, route: str, status: int) -> _Exchange | None:
        """Find the metrics in the default instrumentation; None where it is not as known."""
        # Any callable may be one; only a function has what is looked for here.
        names = getattr(getattr(instrumentation, "__code__", None), "co_freevars", ())
        closure = getattr(instrumentation, "__closure__", None) or ()
        cells = dict(zip(names, closure, strict=False))
        found = {name: cell.cell_contents for name, cell in cells.items()}
        wanted = ("TOTAL", "IN_SIZE", "OUT_SIZE", "LATENCY_HIGHR", "LATENCY_LOWR")
        flags = ("should_only_respect_2xx_for_highr", "should_exclude_streaming_duration")
        if not set(wanted) <= set(found) or any(found.get(flag) for flag in flags):
            return None
        if found.get("custom_labels"):
            return None
        total, sizes_in, sizes_out, fine, coarse = (found[name] for name in wanted)
        return cls(
            total.labels("POST", f"{status // 100}xx", route),
            sizes_in.labels(route),
            sizes_out.labels(route),
            fine,
            coarse.labels("POST", route),
        )

    def count(self, answer: Answer, seconds: float) -> None:
        """Count one exchange."""
        self._total.inc()
        self._in.observe(answer.ask.length)
        self._out.observe(answer.length or 0)
        self._fine.observe(seconds)
        self._coarse.observe(seconds)


class _Slow:
    """Any other instrumentation: called as the middleware calls it."""

    def __init__(self, instrumentation: Any, route: str, status: int) -> None:
        self._instrumentation = instrumentation
        self._route = route
        self._status = status

    def count(self, answer: Answer, seconds: float) -> None:
        """Count one exchange."""
        from prometheus_fastapi_instrumentator.metrics import Info

        response: Any = _Response(answer.length)
        self._instrumentation(
            Info(
                request=Request(answer.cycle.scope),
                response=response,
                method="POST",
                modified_handler=self._route,
                modified_status=f"{self._status // 100}xx",
                modified_duration=seconds,
                modified_duration_without_streaming=seconds,
            )
        )


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    """An application that does nothing."""


def _instrumentations(app: Any) -> list[Any]:
    """Find the functions with which the middleware on vLLM's application counts a request."""
    layer = app.middleware_stack
    while layer is not None:
        if type(layer).__name__ == "PrometheusInstrumentatorMiddleware":
            return list(layer.instrumentations)
        layer = getattr(layer, "app", None)
    return []
