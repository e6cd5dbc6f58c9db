"""The lane's requests are counted in vLLM's HTTP metrics as its middleware would have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("prometheus_fastapi_instrumentator")

import prometheus_client
from prometheus_fastapi_instrumentator import metrics

from scalellm_plugins.frontends import accounting
from scalellm_plugins.frontends.accounting import Accounting

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
EXCHANGES = [
    (CHAT, 200, 10, 100, 0.25),
    (CHAT, 200, 20, None, 2.5),
    (CHAT, 500, 30, 50, 0.001),
    (CHAT, 499, 30, None, 7.0),
    (COMPLETION, 200, 0, 5, 30.0),
]


class PrometheusInstrumentatorMiddleware:
    """Named as the middleware's class."""

    def __init__(self, *instrumentations: Any) -> None:
        self.instrumentations = instrumentations


def application(*instrumentations: Any) -> Any:
    """An application whose middlewares lie around each other, as Starlette has them."""
    inner = PrometheusInstrumentatorMiddleware(*instrumentations)
    return SimpleNamespace(middleware_stack=SimpleNamespace(app=SimpleNamespace(app=inner)))


def answer(path: str, length_in: int, length_out: int | None) -> Any:
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(b"content-length", b"%d" % length_in)],
    }
    return SimpleNamespace(
        ask=SimpleNamespace(route=SimpleNamespace(path=path), length=length_in),
        length=length_out,
        cycle=SimpleNamespace(scope=scope),
    )


def counted(registry: Any) -> dict[Any, float]:
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


def exchanges(made: Accounting) -> None:
    for path, status, length_in, length_out, seconds in EXCHANGES:
        made.ended(answer(path, length_in, length_out), status, seconds)


def test_exchanges_are_counted_as_by_the_middleware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once through the series that were looked up, once through the function itself."""
    quick, slow = prometheus_client.CollectorRegistry(), prometheus_client.CollectorRegistry()
    made = Accounting(application(metrics.default(registry=quick)))
    exchanges(made)
    assert {type(one).__name__ for one in made._exchanges.values()} == {"_Exchange"}
    monkeypatch.setattr(accounting._Exchange, "learn", lambda *_of: None)
    exchanges(Accounting(application(metrics.default(registry=slow))))
    assert counted(quick) == counted(slow)
    assert any(value for (name, *_), value in counted(quick).items() if "total" in name)


def test_each_instrumentation_is_counted_once() -> None:
    """Of two, the second would go without, and the first be counted twice."""
    first, second = prometheus_client.CollectorRegistry(), prometheus_client.CollectorRegistry()
    infos: list[Any] = []
    functions = [metrics.default(registry=one) for one in (first, second)]
    exchanges(Accounting(application(*functions, infos.append)))
    only = prometheus_client.CollectorRegistry()
    exchanges(Accounting(application(metrics.default(registry=only))))
    assert counted(first) == counted(second) == counted(only)
    assert [(info.modified_handler, info.modified_status) for info in infos] == [
        (path, f"{status // 100}xx") for path, status, *_ in EXCHANGES
    ]


@pytest.mark.parametrize(
    "options",
    [{"should_only_respect_2xx_for_highr": True}, {"should_exclude_streaming_duration": True}],
)
def test_instrumentations_with_other_rules_are_called(options: dict[str, bool]) -> None:
    """What they leave out must be left out here as well."""
    ours, theirs = prometheus_client.CollectorRegistry(), prometheus_client.CollectorRegistry()
    made = Accounting(application(metrics.default(registry=ours, **options)))
    exchanges(made)
    assert {type(one).__name__ for one in made._exchanges.values()} == {"_Slow"}
    function = metrics.default(registry=theirs, **options)
    for path, status, length_in, length_out, seconds in EXCHANGES:
        accounting._Slow(function, path, status).count(answer(path, length_in, length_out), seconds)
    assert counted(ours) == counted(theirs)


def test_a_server_without_metrics_counts_nothing() -> None:
    made = Accounting(SimpleNamespace(middleware_stack=None))
    exchanges(made)
    assert not made._exchanges


def test_requests_are_counted_by_lane() -> None:
    def value(lane: str) -> float:
        labels = {"lane": lane, "route": CHAT}
        return prometheus_client.REGISTRY.get_sample_value("scalellm:requests_total", labels) or 0.0

    fast, full = value("fast"), value("full")
    # Two applications in one process share the counter.
    for made in (Accounting(application()), Accounting(application())):
        made.routed(CHAT, fast=True)
    made.routed(CHAT, fast=False)
    assert (value("fast") - fast, value("full") - full) == (2, 1)


@pytest.mark.parametrize(
    ("trusted", "enabled", "expected"),
    [("127.0.0.1", True, "9.9.9.9"), ("10.0.0.1", True, "127.0.0.1"), ("*", False, "127.0.0.1")],
)
def test_the_access_log_names_the_client_behind_a_trusted_proxy(
    trusted: str, enabled: bool, expected: str
) -> None:
    app = application()
    config = SimpleNamespace(proxy_headers=enabled, forwarded_allow_ips=trusted)
    app.state = SimpleNamespace(server=SimpleNamespace(config=config))
    made = Accounting(app)
    lines: list[Any] = []
    made._log = SimpleNamespace(  # type: ignore[assignment]
        write=lambda scope, status: lines.append((scope["client"][0], status))
    )
    for access_log in (True, False):
        scope = {
            "type": "http",
            "scheme": "http",
            "client": ("127.0.0.1", 5),
            "headers": [(b"x-forwarded-for", b"9.9.9.9")],
        }
        made.started(SimpleNamespace(access_log=access_log, scope=scope), 200)
    assert lines == [(expected, 200)]
