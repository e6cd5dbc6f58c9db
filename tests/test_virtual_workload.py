"""Workloads of `scalellm simulate`: what was asked for, and the same for the same seed."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm_plugins.errors import ConfigError
from scalellm_plugins.virtual import lengths, tenants
from scalellm_plugins.virtual.job import Request
from scalellm_plugins.virtual.lengths import Lengths
from scalellm_plugins.virtual.tenants import Tenant
from scalellm_plugins.virtual.trace import Row, Trace
from scalellm_plugins.virtual.workload import Defaults, prompt_ids, synthetic, traced

NAMES = st.sampled_from(["a", "b", "c"])


def times(requests: list[Request], tenant: str = "default") -> list[float]:
    return [request.at for request in requests if request.tenant == tenant]


# Arrivals


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.floats(0.5, 20), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_same_seed_gives_the_same_requests(seed: int, rate: float, cv: float) -> None:
    senders = [Tenant(name="a", rate=rate, cv=cv), Tenant(name="b", prompt="sharegpt")]
    made = [synthetic(senders, Defaults(rate=2.0), 30.0, seed) for _ in range(2)]
    assert made[0] == made[1]
    assert made[0] != synthetic(senders, Defaults(rate=2.0), 30.0, seed + 1)


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.floats(1, 20), st.floats(0, 10), st.floats(1, 20))
def test_requests_are_in_order_and_within_their_tenants_times(
    seed: int, rate: float, start: float, length: float
) -> None:
    senders = [Tenant(name="a", rate=rate), Tenant(name="b", from_s=start, until_s=start + length)]
    requests = synthetic(senders, Defaults(rate=rate), 25.0, seed)
    assert [r.at for r in requests] == sorted(r.at for r in requests)
    assert all(0 <= at < 25 for at in times(requests, "a"))
    assert all(start <= at < min(25, start + length) for at in times(requests, "b"))


def test_a_tenant_more_changes_nothing_for_the_others() -> None:
    alone = synthetic([Tenant(name="a")], Defaults(rate=3.0), 100.0, 7)
    both = synthetic([Tenant(name="b"), Tenant(name="a")], Defaults(rate=3.0), 100.0, 7)
    assert [request for request in both if request.tenant == "a"] == alone
    assert times(both, "a") != times(both, "b"), "tenants do not arrive in step"


@pytest.mark.parametrize("cv", [0.4, 1.0, 3.0])
def test_rate_and_burstiness_are_what_was_asked_for(cv: float) -> None:
    at = times(synthetic([Tenant(cv=cv)], Defaults(rate=5.0), 8000.0, 1))
    assert len(at) / 8000 == pytest.approx(5.0, rel=0.05)
    gaps = [later - earlier for earlier, later in pairwise(at)]
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.1)


def test_a_tenants_own_values_come_before_the_workloads() -> None:
    own = Tenant(name="a", rate=2, prompt=7, output="alpaca", weight=3, priority=-1, ttft_ms=50)
    defaults = Defaults(rate=1.0, prompt="9", output="11", ttft_ms=100, tpot_ms=20, deadline_ms=5e3)
    requests = synthetic([own, Tenant(name="b")], defaults, 60.0, 0)
    mine = [request for request in requests if request.tenant == "a"]
    theirs = [request for request in requests if request.tenant == "b"]
    assert {(r.prompt, r.weight, r.priority, r.ttft_ms, r.tpot_ms) for r in mine} == {
        (7, 3.0, -1, 50.0, 20.0)
    }
    assert len({r.output for r in mine}) > 5
    assert {(r.prompt, r.output, r.weight, r.ttft_ms, r.deadline_ms) for r in theirs} == {
        (9, 11, 1.0, 100.0, 5e3)
    }


def test_no_request_at_all_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--seconds: no request arrives in 0\.001 s"):
        synthetic([Tenant()], Defaults(rate=0.1), 0.001, 0)


def test_a_trace_is_shared_out_by_rate_and_its_lengths_may_be_replaced() -> None:
    trace = Trace("azure", [Row(i / 10, 100 + i % 3, 20) for i in range(4000)], 0)
    senders = [Tenant(name="a", rate=1), Tenant(name="b", rate=3, output=5, until_s=300)]
    requests = traced(trace, senders, Defaults(prompt="1", output="1"), 0)
    assert requests == traced(trace, senders, Defaults(prompt="1", output="1"), 0)
    early = Counter(request.tenant for request in requests if request.at < 300)
    assert early["b"] / early["a"] == pytest.approx(3, rel=0.15)
    assert {(r.tenant, r.output) for r in requests} == {("a", 20), ("b", 5)}
    assert {r.prompt for r in requests} == {100, 101, 102}, "the trace's, not the defaults"
    assert not [r for r in requests if r.tenant == "b" and r.at >= 300]


def test_more_requests_than_memory_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--rate: about 60,000,000 requests in 60 s"):
        synthetic([Tenant(rate=1e6)], Defaults(), 60.0, 0)


# Lengths


@settings(max_examples=200)
@given(st.integers(0, 1000), st.sampled_from(sorted(lengths.PRESETS)), st.sampled_from("po"))
def test_presets_stay_within_their_bounds(seed: int, name: str, side: str) -> None:
    import random

    found = lengths.parse(name, "prompt" if side == "p" else "output", "--x")
    assert 1 <= found.draw(random.Random(seed)) <= found.longest


def test_a_lognormal_has_the_median_and_spread_that_it_was_given() -> None:
    import math
    import random

    found = lengths.parse("lognormal:median=500:sigma=0.5", "prompt", "--prompt-tokens")
    dice = random.Random(0)
    drawn = [found.draw(dice) for _ in range(20_000)]
    assert statistics.median(drawn) == pytest.approx(500, rel=0.02)
    assert statistics.stdev(map(math.log, drawn)) == pytest.approx(0.5, rel=0.02)


def test_other_forms_of_lengths() -> None:
    import random

    dice = random.Random(0)
    assert lengths.parse(" 512 ", "prompt", "--x").draw(dice) == 512
    uniform = lengths.parse("uniform:3-5", "prompt", "--x")
    assert {uniform.draw(dice) for _ in range(200)} == {3, 4, 5}
    cut = lengths.parse("lognormal:median=100:sigma=2:min=90:max=110", "prompt", "--x")
    assert {cut.draw(dice) for _ in range(500)} >= {90, 110}
    assert lengths.parse("sharegpt", "prompt", "--x") != lengths.parse("sharegpt", "output", "--x")
    mean = statistics.mean(lengths.PRESETS["sharegpt"]["output"].draw(dice) for _ in range(20_000))
    assert mean == pytest.approx(338, rel=0.1), "as in the paper that it follows"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-3",
        "1e9",
        "many",
        "uniform:5",
        "uniform:9-3",
        "lognormal:median=5",
        "lognormal:median=nan:sigma=1",
        "lognormal:median=5:sigma=-1",
        "lognormal:median=5:sigma=1:mx=7",
        "lognormal:sigma=1",
        "200000",
    ],
)
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--output-tokens: .* is no length in tokens.*sharegpt"):
        lengths.parse(text, "output", "--output-tokens")


# Tenants


def test_tenants_on_the_command_line() -> None:
    assert tenants.parse("a:weight=2:rate=3,b:prompt=sharegpt:priority=-1, c") == [
        Tenant(name="a", weight=2, rate=3),
        Tenant(name="b", prompt="sharegpt", priority=-1),
        Tenant(name="c"),
    ]


def test_tenants_in_files(tmp_path: Path) -> None:
    wanted = [Tenant(name="a", rate=2, prompt="uniform:1-9"), Tenant(name="b", from_s=5, until_s=9)]
    yaml, json = tmp_path / "t.yaml", tmp_path / "t.json"
    yaml.write_text(
        "tenants:\n- {name: a, rate: 2, prompt: 'uniform:1-9'}\n- {name: b, from_s: 5, until_s: 9}"
    )
    json.write_text(
        '[{"name": "a", "rate": 2, "prompt": "uniform:1-9"},'
        ' {"name": "b", "from_s": 5, "until_s": 9}]'
    )
    assert tenants.parse(str(yaml)) == wanted
    assert tenants.parse(str(json)) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:weigth=2", r"a: unknown key 'weigth'. Valid: weight"),
        ("a:weight", r"'weight' is not KEY=VALUE"),
        ("a:weight=-1", r"a: .*weight.*"),
        ("a:rate=fast", r"a: .*rate"),
        ("a:weight=inf", r"a: .*weight"),
        ("a:rate=inf", r"a: .*not finite"),
        ("a,b:rate=0", r"b: .*rate"),
        ("a,b,a", r"'a' is there twice"),
        ("", r"name"),
        ("a b", r"name"),
        ("a:from_s=5:until_s=5", r"until_s 5 is not after from_s 5"),
        ("nowhere.yaml", r"nowhere.yaml': No such file"),
    ],
)
def test_tenants_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--tenants: .*{message}"):
        tenants.parse(text)


@pytest.mark.parametrize(
    ("name", "text"), [("t.json", "[{"), ("t.yaml", "a: [1"), ("t.yml", "a: 1"), ("t.json", "[3]")]
)
def test_files_that_hold_no_tenants(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"^--tenants: "):
        tenants.parse(str(path))


# Prompts


@settings(max_examples=100)
@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(0, 200), NAMES)
def test_prompts_have_their_length(number: int, prompt: int, prefix: int, tenant: str) -> None:
    one = Request(at=0.0, tenant=tenant, prompt=prompt, output=1, prefix=min(prefix, prompt))
    assert len(prompt_ids(number, one)) == prompt


@settings(max_examples=100)
@given(st.integers(0, 2**31), st.integers(0, 2**31), st.integers(0, 60), NAMES, NAMES)
def test_prompts_share_their_tenants_prefix_and_nothing_else(
    number: int, other: int, prefix: int, tenant: str, second: str
) -> None:
    def ids(number: int, tenant: str) -> list[int]:
        one = Request(at=0.0, tenant=tenant, prompt=100, output=1, prefix=prefix)
        return prompt_ids(number, one)

    mine, theirs = ids(number, tenant), ids(other, second)
    if tenant == second:
        assert mine[:prefix] == theirs[:prefix]
    elif prefix:
        assert mine[:prefix] != theirs[:prefix]
    if number != other:
        assert mine[prefix : prefix + 4] != theirs[prefix : prefix + 4]


def test_lengths_know_their_longest() -> None:
    assert Lengths(7).longest == 7
    assert Lengths(7, 1.0, high=9).longest == 9
