"""`/metrics` of the whole server, from whichever worker is asked.

What the workers wrote into their slots' `Series` is added up here, so that every sample is there
once and reads as if there were one process: counters and histograms are sums, with the time at
which the first worker made them; a gauge is what its mode says, and "mostrecent" goes by when the
engine sent it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import prometheus_client
from prometheus_client import metrics as _metrics
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

from .shared_series import Series
from .shared_values import Key

_LATEST = "mostrecent"
_COUNTING = ("counter", "summary", "histogram")
_MODES = {
    # In one process it is the time at which a set of adapters was last seen: its sum means nothing.
    "vllm:lora_requests_info": "max",
}
_SHARE = ("scalellm:gateway_share", "scalellm:gateway_seconds", "scalellm:request_seconds")
"""A gauge, and the counters (of all workers) whose quotient it is."""

_decode = msgspec.json.Decoder(Key).decode


class _Total:
    """One sample, over all slots."""

    __slots__ = ("key", "stamp", "value")

    def __init__(self, key: Key, value: float, stamp: float) -> None:
        self.key = key
        self.value = value
        self.stamp = stamp

    def add(self, mode: str, value: float, stamp: float) -> None:
        """Take another slot's value in."""
        if mode == _LATEST:
            if stamp > self.stamp:
                self.value, self.stamp = value, stamp
        elif mode == "max":
            self.value = max(self.value, value)
        elif mode == "min":
            self.value = min(self.value, value)
        else:
            self.value += value
            if self.key.kind != "gauge":
                self.stamp = min(self.stamp, stamp)


class ServerCollector:
    """A collector of prometheus_client over all slots."""

    def __init__(self, slots: Sequence[Series]) -> None:
        self._slots = slots
        self._keys: dict[bytes, Key] = {}

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of the server, in the order in which they were made."""
        families: dict[str, list[_Total]] = {}
        for total in self._totals():
            families.setdefault(total.key.metric, []).append(total)
        _fill_share(families)
        for name, totals in families.items():
            yield _family(name, totals)
        yield from prometheus_client.PLATFORM_COLLECTOR.collect()

    def _totals(self) -> Iterable[_Total]:
        totals: dict[Any, _Total] = {}
        for number, series in enumerate(self._slots):
            alive = series.pid != 0
            for raw, value, stamp in series.read():
                key = self._keys.get(raw)
                if key is None:
                    key = self._keys[raw] = _decode(raw)
                if key.mode.startswith("live") and not alive:
                    continue
                mode = _MODES.get(key.metric) or key.mode.removeprefix("live")
                place: Any = raw
                if mode == "all":
                    # Nothing of vLLM's: a sample per worker, told apart as prometheus_client does.
                    key = msgspec.structs.replace(key, labels={**key.labels, "pid": str(number)})
                    place = (raw, number)
                total = totals.get(place)
                if total is None:
                    totals[place] = _Total(key, value, stamp)
                else:
                    total.add(mode, value, stamp)
        return totals.values()


def _fill_share(families: dict[str, list[_Total]]) -> None:
    gauge, part, whole = (families.get(name) for name in _SHARE)
    if gauge and part and whole and whole[0].value:
        gauge[0].value = part[0].value / whole[0].value


def _family(name: str, totals: list[_Total]) -> Metric:
    first = totals[0].key
    family = Metric(name, first.text, first.kind)
    if first.kind == "histogram":
        _add_histogram(family, totals)
    else:
        for total in totals:
            family.add_sample(total.key.name, total.key.labels, total.value)
    if first.kind in _COUNTING and getattr(_metrics, "_use_created", True):
        # Once for each set of labels: a summary has two values, a histogram many.
        suffix = "_total" if first.kind == "counter" else "_sum"
        for total in totals:
            if total.key.name == name + suffix:
                family.add_sample(f"{name}_created", total.key.labels, total.stamp)
    return family


def _add_histogram(family: Metric, totals: list[_Total]) -> None:
    """Buckets are counted one by one and shown as the running sum; the count is the last."""
    sums: list[_Total] = []
    buckets: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
    for total in totals:
        labels = dict(total.key.labels)
        upper = labels.pop("le", None)
        if upper is None:
            sums.append(total)
        else:
            buckets.setdefault(tuple(labels.items()), []).append((float(upper), total.value))
    for total in sums:
        labels, below = total.key.labels, 0.0
        for bound, count in sorted(buckets.get(tuple(labels.items()), ())):
            below += count
            le = floatToGoString(bound)  # type: ignore[no-untyped-call]
            family.add_sample(f"{family.name}_bucket", {**labels, "le": le}, below)
        family.add_sample(f"{family.name}_count", labels, below)
        family.add_sample(f"{family.name}_sum", labels, total.value)


def expose(app: Any, slots: Sequence[Series]) -> None:
    """Answer `/metrics` on vLLM's application with the server's, in front of its own route."""
    from starlette.responses import Response
    from starlette.routing import Mount, Route

    registry = prometheus_client.CollectorRegistry()
    registry.register(ServerCollector(slots))

    def metrics(_: Any) -> Response:
        # vLLM's own route: this format, whatever the client would accept.
        body = prometheus_client.generate_latest(registry)
        return Response(body, headers={"content-type": prometheus_client.CONTENT_TYPE_LATEST})

    route = Route("/metrics", metrics, include_in_schema=False)
    route.methods = {"GET"}
    routes = app.router.routes
    for mounted in routes:
        if isinstance(mounted, Mount) and mounted.path == "/metrics":
            mounted.app = prometheus_client.make_asgi_app(registry)
    routes.insert(0, route)
