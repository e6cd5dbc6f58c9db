"""Figures of simulations, on examples that can be worked out by hand."""

from __future__ import annotations

import json
import statistics
from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.scheduling.fair import OUTPUT_WEIGHT
from scalellm_plugins.virtual import collect, report
from scalellm_plugins.virtual.collect import Collector
from scalellm_plugins.virtual.fairness import GapMeter, bound
from scalellm_plugins.virtual.job import Engine, Gap, Record, Request, Run
from scalellm_plugins.virtual.metrics import e2e, kept, percentile, spread, summary, tpot, ttft


def request(at: float = 0.0, tenant: str = "a", **more: Any) -> Request:
    return Request(**({"at": at, "tenant": tenant, "prompt": 10, "output": 5} | more))


def record(first: float, last: float, tokens: int = 5, **more: Any) -> Record:
    known = {"scheduled": first, "first": first, "last": last, "tokens": tokens, "outcome": "done"}
    return Record(**(known | more))


# Percentiles and targets


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50))
def test_percentiles_are_those_of_the_standard_library(values: list[float]) -> None:
    ordered = sorted(values)
    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    for share in (0.5, 0.9, 0.99):
        wanted = hundredths[round(share * 100) - 1]
        assert percentile(ordered, share) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_a_spread_is_in_milliseconds_and_of_nothing_is_none() -> None:
    assert spread([0.001]) == {"mean": 1.0, "p50": 1.0, "p90": 1.0, "p99": 1.0, "max": 1.0}
    assert spread([]) is None


def test_latencies_count_from_the_arrival() -> None:
    one, answer = request(at=2.0), record(2.5, 4.5)
    assert (ttft(one, answer), tpot(answer), e2e(one, answer)) == (0.5, 0.5, 2.5)
    assert tpot(record(1.0, 1.0, tokens=1)) is None, "one token has no pace"
    never = Record(outcome="dropped", last=9.0)
    assert (ttft(one, never), tpot(never), e2e(one, never)) == (None, None, 7.0)


@pytest.mark.parametrize(
    ("targets", "good"),
    [
        ({}, True),
        ({"ttft_ms": 500.0}, True),
        ({"ttft_ms": 499.0}, False),
        ({"tpot_ms": 500.0, "deadline_ms": 2500.0}, True),
        ({"tpot_ms": 499.0}, False),
        ({"deadline_ms": 2499.0, "ttft_ms": 1e6}, False),
    ],
)
def test_all_targets_must_be_kept(targets: dict[str, float], good: bool) -> None:
    assert kept(request(at=2.0, **targets), record(2.5, 4.5)) is good


def test_an_answer_that_never_came_keeps_no_target() -> None:
    assert not kept(request(), Record(outcome="dropped"))
    assert kept(request(tpot_ms=1.0), record(1.0, 1.0, tokens=1)), "one token is never too slow"


# The fairness gap


def gaps(*events: Any, weights: dict[str, float] | None = None) -> Gap | None:
    """Events: (tenant, tokens of prompts) or a list of who waits then."""
    meter = GapMeter(weights or {"a": 1.0, "b": 1.0, "c": 1.0})
    for at, event in enumerate(events):
        if isinstance(event, tuple):
            meter.serve(event[0], prompt=event[1])
        else:
            meter.note(float(at), event)
    return meter.worst


def test_the_gap_counts_only_while_both_wait() -> None:
    assert gaps(("a", 1000), "a", ("a", 50), "a", "b") is None, "never both"
    # 1000 from before they both waited; then a gets 30.
    found = gaps(("a", 1000), "ab", ("a", 30), "ab", ("b", 10), "ab")
    assert found == Gap(tokens=30.0, pair=("a", "b"), until=3.0)
    # b stops waiting in between: what happened until it waits again does not count.
    found = gaps("ab", ("a", 30), "a", ("a", 500), "a", "ab", ("a", 40), "ab")
    assert found == Gap(tokens=40.0, pair=("a", "b"), until=7.0)


def test_the_gap_is_over_any_interval_not_from_its_beginning() -> None:
    # First b gets 30, then a 80: between those moments a got 80 more.
    found = gaps("ab", ("b", 30), "ab", ("a", 80), "ab")
    assert found == Gap(tokens=80.0, pair=("a", "b"), until=4.0)


def test_the_gap_is_of_the_worst_pair_and_per_weight() -> None:
    found = gaps("abc", ("a", 30), "abc", ("c", 90), "abc", weights={"a": 1, "b": 1, "c": 10})
    assert found == Gap(tokens=30.0, pair=("a", "b"), until=2.0)


STEP = st.tuples(st.tuples(*[st.integers(0, 50)] * 3), st.sets(st.sampled_from("abc")).map(sorted))


@given(st.lists(STEP, max_size=25))
def test_the_gap_is_the_largest_over_all_intervals(steps: list[tuple[Any, list[str]]]) -> None:
    """Against every pair of moments between which both always waited."""
    meter = GapMeter(dict.fromkeys("abc", 1.0))
    moments = []
    for at, (tokens, waiting) in enumerate(steps):
        for tenant, number in zip("abc", tokens, strict=True):
            meter.serve(tenant, prompt=number)
        meter.note(float(at), waiting)
        moments.append((dict(meter.served), waiting))
    largest = -1.0
    for start in range(len(moments)):
        for end in range(start, len(moments)):
            always = set("abc").intersection(*(names for _, names in moments[start : end + 1]))
            for one, other in combinations(sorted(always), 2):
                before, after = moments[start][0], moments[end][0]
                got = (after[one] - before[one]) - (after[other] - before[other])
                largest = max(largest, abs(got))
    assert (meter.worst.tokens if meter.worst else -1.0) == largest


def test_output_tokens_count_twice() -> None:
    meter = GapMeter({"a": 2.0})
    meter.serve("a", prompt=10, output=10)
    assert meter.served == {"a": (10 + OUTPUT_WEIGHT * 10) / 2}


def test_the_bound_is_the_papers() -> None:
    small = [request(prompt=10, output=100), request(prompt=50, output=20, weight=0.5)]
    assert bound(small, seats=4, kv_tokens=10**6) == 2 * OUTPUT_WEIGHT * 4 * 100 / 0.5
    assert bound(small, seats=400, kv_tokens=1000) == 2 * OUTPUT_WEIGHT * 1000 / 0.5
    long = [request(prompt=10_000, output=1)]
    assert bound(long, seats=4, kv_tokens=10**6) == 2 * 10_000


# What is written down


class Wire:
    """An engine's side of a collector."""

    def __init__(self, *requests: Request) -> None:
        self.collector = Collector(requests)
        self.requests = {
            str(i): SimpleNamespace(request_id=str(i), num_output_tokens=0, num_preemptions=0)
            for i in range(len(requests))
        }
        for id_, one in self.requests.items():
            self.collector.add(id_, one)

    def said(self, id_: str, at: float, tokens: int, finish: str | None = None, stop: Any = None):
        self.requests[id_].num_output_tokens += tokens
        output = SimpleNamespace(
            request_id=id_, new_token_ids=[1] * tokens, finish_reason=finish, stop_reason=stop
        )
        self.collector.output(output, at)

    def step(self, at: float, *running: str, kv: float = 0.0) -> None:
        self.collector.step(at, [self.requests[id_] for id_ in running], kv)


def test_a_request_from_its_first_share_to_its_end() -> None:
    wire = Wire(request())
    wire.collector.scheduled(["0"], 1.0)
    wire.collector.scheduled(["0"], 3.0)  # back after a preemption
    wire.said("0", 4.0, 1)
    wire.requests["0"].num_output_tokens += 1
    wire.collector.plain(["0"])
    wire.requests["0"].num_preemptions = 1
    wire.said("0", 6.0, 1, "length")
    (found,) = wire.collector.records
    assert found == Record(
        scheduled=1.0, first=4.0, last=6.0, tokens=3, preemptions=1, outcome="done"
    )
    assert wire.collector.tokens == 3
    assert wire.collector.gaps.served == {"a": 10 + OUTPUT_WEIGHT * 3}, "the prompt once"
    assert not wire.collector.alive


@pytest.mark.parametrize(
    ("stop", "outcome", "reason"),
    [
        ("scalellm:504:too late by 3 s", "dropped", "too late by 3 s"),
        ("scalellm:429:quota: tokens", "refused", "quota: tokens"),
        ("scalellm:429;12:later", "refused", "later"),
        ("scalellm:500:odd", "failed", "odd"),
        ("something", "failed", "something"),
        (None, "failed", "error"),
    ],
)
def test_how_a_request_ends_without_an_answer(stop: Any, outcome: str, reason: str) -> None:
    wire = Wire(request())
    wire.said("0", 4.0, 0, "error", stop)
    (found,) = wire.collector.records
    assert (found.outcome, found.reason, found.first, found.last) == (outcome, reason, None, 4.0)
    assert wire.collector.ended == 1


def test_who_waits_is_who_is_there_and_does_not_run() -> None:
    wire = Wire(request(), request(tenant="b"), request(tenant="b"))
    wire.collector.scheduled(["0"], 0.0)
    wire.step(1.0, "0")  # only b waits
    wire.said("0", 2.0, 5)
    wire.step(2.0, "1")  # a was preempted: both wait
    wire.collector.plain(["1", "2"])
    wire.step(3.0, "1")
    assert wire.collector.gaps.worst == Gap(tokens=2 * OUTPUT_WEIGHT, pair=("a", "b"), until=3.0), (
        "what a got while b alone waited does not count"
    )


def test_kv_use_is_a_mean_over_time() -> None:
    wire = Wire(request())
    for at, kv in ((1.0, 0.5), (3.0, 0.0), (13.0, 0.4), (14.0, 0.4)):
        wire.step(at, "0", kv=kv)
    assert wire.collector.kv_max == 0.5
    assert wire.collector.kv_mean == pytest.approx((2 * 0.5 + 10 * 0.0 + 1 * 0.4) / 14)


def test_samples_stay_few_and_cover_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "MOST_SAMPLES", 40)
    wire = Wire(request())
    for number in range(20_000):
        wire.step(number / 100)
    moments = [sample.at for sample in wire.collector.samples]
    assert 15 <= len(moments) < 40
    assert moments == sorted(moments)
    assert moments[0] == 0.0
    assert max(later - earlier for earlier, later in pairwise(moments)) < 25


# Summaries and their tables


def example() -> tuple[list[Request], Run]:
    requests = [
        request(0.0, "a", ttft_ms=1000.0),
        request(1.0, "b", ttft_ms=1000.0),
        request(2.0, "b", weight=2.0, deadline_ms=9000.0),
    ]
    records = [
        record(0.5, 4.5),
        record(3.0, 5.0, preemptions=2),
        Record(last=8.0, outcome="dropped", reason="too late"),
    ]
    engine = Engine(
        vllm="0",
        scheduler="S",
        max_num_seqs=2,
        max_num_batched_tokens=64,
        kv_blocks=100,
        block_size=16,
    )
    run = Run(
        engine=engine,
        records=records,
        tenants=["a", "b"],
        samples=[],
        seconds=10.0,
        steps=7,
        busy_s=5.0,
        tokens=10,
        kv_mean=0.25,
        kv_max=0.5,
        kv_left=0,
        gap=Gap(tokens=12.0, pair=("a", "b"), until=3.0),
    )
    return requests, run


def test_a_summary() -> None:
    figures = summary(*example())
    assert (figures["done"], figures["dropped"], figures["failed"]) == (2, 1, 0)
    assert figures["attainment"] == pytest.approx(1 / 3)
    assert figures["goodput_req_s"] == pytest.approx(0.1)
    assert figures["goodput_tok_s"] == pytest.approx(0.5)
    assert figures["output_tok_s"] == pytest.approx(1.0)
    assert figures["prompt_tok_s"] == pytest.approx(2.0), "the dropped one was never computed"
    assert figures["ttft"]["p50"] == pytest.approx(1250.0)
    assert figures["preemptions"] == 2
    assert figures["gpu_busy"] == 0.5
    assert figures["tenants"]["a"]["service"] == 10 + OUTPUT_WEIGHT * 5
    assert figures["fairness"]["gap"] == 12.0
    assert figures["fairness"]["between"] == ["a", "b"]


def test_the_table_has_a_column_for_each_policy_and_what_is_not_there_as_a_dash() -> None:
    requests, run = example()
    none = Run(
        **{n: getattr(run, n) for n in run.__struct_fields__ if n not in ("records", "gap")},
        records=[Record(outcome="dropped", last=1.0) for _ in requests],
    )
    results = {"one": summary(requests, run), "other": summary(requests, none)}
    text = report.table(results)
    lines = {line.split("  ")[0]: line.split() for line in text.partition("\n\n")[0].splitlines()}
    assert text.splitlines()[0].split() == ["one", "other"]
    assert lines["dropped"][-2:] == ["1", "3"]
    assert "refused" not in lines
    assert lines["within targets"][-2:] == ["33.3%", "0.0%"]
    assert lines["TTFT ms p50 / p90 / p99"][-1] == "–"
    assert "never two waited" in text
    assert "12 (a – b)" in text
    assert "tenant b (weight 1)" in text


def test_the_document_is_json_with_the_command_and_each_request_if_asked_for() -> None:
    requests, run = example()
    results = {"one": summary(requests, run)}
    whole = report.document("simulate …", requests, {"one": run}, results, each=True)
    found = json.loads(json.dumps(whole))
    assert found["command"] == "simulate …"
    assert found["workload"]["requests"] == 3
    assert found["policies"]["one"]["each"][2]["reason"] == "too late"
    assert found["policies"]["one"]["engine"]["max_num_seqs"] == 2
    short = report.document("simulate …", requests, {"one": run}, results)
    assert "each" not in short["policies"]["one"]
