"""Metrics of several workers read as those of one process: sums, the newest, each sample once."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.frontends import shared_values
from scalellm_plugins.frontends.shared_metrics import ServerCollector
from scalellm_plugins.frontends.shared_series import Series

NUMBER = st.integers(min_value=-1000, max_value=1000).map(float)


@given(st.lists(st.tuples(st.integers(0, 1), st.binary(min_size=1, max_size=9), NUMBER)))
def test_series_are_a_mapping_whoever_writes_and_reads_them(steps: Any) -> None:
    """Two owners in turn, one reader that looks after every step."""
    series = Series()
    reader = _another(series)
    owners = (series, _another(series))
    expected: dict[bytes, float] = {}
    for owner, key, value in steps:
        at, fresh = owners[owner].at(key)
        assert fresh == (key not in expected)
        owners[owner].words[at] = value
        expected[key] = value
        assert {key: value for key, value, _ in reader.read()} == expected


def _another(series: Series) -> Series:
    """Another process's view of the same memory."""
    made = Series.__new__(Series)
    made._file = series._file
    made._known = {}
    made._parsed = 16
    made._map()
    return made


def test_series_grow_under_values_that_are_in_use() -> None:
    series = Series()
    first, _ = series.at(b"first")
    words = series.words
    reader = _another(series)
    list(reader.read())
    for number in range(5000):
        series.words[series.at(b"%d" % number + b"x" * 100)[0]] = number
    words[first] = 7.0
    found = {key: value for key, value, _ in reader.read()}
    assert found[b"first"] == 7.0
    assert found[b"4999" + b"x" * 100] == 4999.0
    assert len(found) == 5001


class Workers:
    """Values of several slots in one process, as forked workers have them."""

    def __init__(self, count: int) -> None:
        self.series = [Series() for _ in range(count)]
        self.names: dict[Any, Any] = {}

    def value(self, slot: int, kind: str, name: str, mode: str = "", **labels: str) -> Any:
        shared_values.bind(self.series[slot])
        metric = name.removesuffix("_total").removesuffix("_sum")
        metric = metric.removesuffix("_bucket").removesuffix("_count")
        return shared_values.SlotValue(
            kind, metric, name, tuple(labels), tuple(labels.values()), "help", mode
        )

    def scrape(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Sample → value; fails on a sample that is there twice."""
        found = {}
        for family in ServerCollector(self.series).collect():
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                assert key not in found, key
                found[key] = sample.value
        return found


@pytest.fixture
def workers() -> Any:
    yield Workers(3)
    shared_values._series = None


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.integers(0, 9))))
def test_counters_are_sums_over_workers_that_come_and_go(steps: Any) -> None:
    workers, expected = Workers(3), defaultdict(float)
    for slot, route, amount in steps:  # each time another worker of the slot
        workers.value(slot, "counter", "asked_total", route=route).inc(amount)
        expected[route] += amount
        workers.series[slot].occupy(0)
        found = workers.scrape()
        assert {r: found["asked_total", (("route", r),)] for r in expected} == expected
    shared_values._series = None


def test_what_was_made_before_the_fork_counts_in_the_worker(workers: Any) -> None:
    shared_values._series = None
    early = shared_values.SlotValue("counter", "early", "early_total", (), (), "help")
    shared_values.bind(workers.series[1])
    early.inc(2)
    assert workers.scrape()["early_total", ()] == 2


def test_created_is_when_the_first_worker_made_it(workers: Any) -> None:
    workers.value(0, "counter", "asked_total")
    workers.value(1, "counter", "asked_total")
    for series, stamp in zip(workers.series, (20.0, 10.0), strict=False):
        ((key, _, _),) = series.read()
        series.words[series.at(key)[0] + 1] = stamp
    assert workers.scrape()["asked_created", ()] == 10.0


def test_a_histogram_is_accumulated_once(workers: Any) -> None:
    for slot, counts in ((0, (1, 2, 3)), (2, (10, 20, 30))):
        workers.value(slot, "histogram", "took_sum", route="x").inc(sum(counts))
        for le, count in zip(("0.5", "10.0", "+Inf"), counts, strict=True):
            workers.value(slot, "histogram", "took_bucket", route="x", le=le).inc(count)
    found = workers.scrape()
    buckets = [found["took_bucket", (("le", le), ("route", "x"))] for le in ("0.5", "10.0", "+Inf")]
    assert buckets == [11, 33, 66]
    assert found["took_count", (("route", "x"),)] == 66
    assert found["took_sum", (("route", "x"),)] == 66


def test_a_gauge_follows_the_newest_message_not_the_latest_setting(workers: Any) -> None:
    clock = shared_values.clock
    late = workers.value(0, "gauge", "running", "mostrecent")
    prompt = workers.value(1, "gauge", "running", "mostrecent")
    clock._last = 200.0
    clock.during(lambda: prompt.set(0.0, timestamp=9000.0))()
    clock._last = 100.0
    clock.during(lambda: late.set(5.0, timestamp=9999.0))()  # got to it later; it is older
    assert workers.scrape()["running", ()] == 0.0
    late.set(3.0, timestamp=300.0)  # not a message: its own time
    assert workers.scrape()["running", ()] == 3.0


def test_gauges_of_the_living_are_not_the_dead_ones(workers: Any) -> None:
    workers.value(0, "gauge", "open", "livesum").set(4.0)
    workers.value(1, "gauge", "open", "livesum").set(2.0)
    assert workers.scrape()["open", ()] == 6.0
    workers.series[0].occupy(0)
    assert workers.scrape()["open", ()] == 2.0
    shared_values.bind(workers.series[0])  # the slot's next worker, which has not touched it
    assert workers.scrape()["open", ()] == 2.0


def test_the_gateways_share_is_of_all_workers(workers: Any) -> None:
    for slot, (part, whole) in enumerate(((1, 2), (2, 18))):
        workers.value(slot, "counter", "scalellm:gateway_seconds_total").inc(part)
        workers.value(slot, "counter", "scalellm:request_seconds_total").inc(whole)
        gauge = workers.value(slot, "gauge", "scalellm:gateway_share", "mostrecent")
        gauge.set(part / whole, timestamp=1.0)
    assert workers.scrape()["scalellm:gateway_share", ()] == 3 / 20


_SAME = """
import sys
if sys.argv[1] == "ours":
    from scalellm_plugins.frontends import shared_values
    from scalellm_plugins.frontends.shared_series import Series
    shared_values.install()
from prometheus_client import Counter, Gauge, Histogram, Summary, REGISTRY, generate_latest
made = [
    Counter("asked", "Asked", ("route",)),
    Histogram("took", "Took", ("route",), buckets=(0.1, 1)),
    Gauge("open", "Open", ("route",), multiprocess_mode="mostrecent"),
]
size, plain = Summary("size", "Size\\nof it", ("route",)), Histogram("plain", "Plain")
if sys.argv[1] == "ours":
    from scalellm_plugins.frontends.shared_metrics import ServerCollector
    series = [Series(), Series()]
    shared_values.bind(series[1])
    REGISTRY = ServerCollector(series)
for route in ('a"b', "c"):
    made[0].labels(route).inc(2)
    made[1].labels(route).observe(0.5)
    made[2].labels(route).set(4)
    size.labels(route).observe(3)
text = generate_latest(REGISTRY).decode()
for family in text.split("# HELP ")[1:]:
    if not family.startswith(("process_", "python_")):
        for line in family.splitlines():
            print(line.rpartition(" ")[0] if "_created" in line else line)
"""


def test_the_text_is_what_one_process_writes() -> None:
    texts = [
        subprocess.run(
            [sys.executable, "-c", _SAME, which], capture_output=True, text=True, check=True
        ).stdout
        for which in ("plain", "ours")
    ]
    assert sorted(texts[0].splitlines()) == sorted(texts[1].splitlines())
    assert "took_bucket" in texts[1]
