"""Which schedulers `scalellm simulate` runs, and what a process sees of virtual time."""

from __future__ import annotations

import json
import sys
import time
import types

import pytest

from scalellm_plugins.errors import ConfigError
from scalellm_plugins.simulator.timeline import VirtualClock
from scalellm_plugins.virtual import policies
from scalellm_plugins.virtual.clock import CLOCKS, VirtualTime, install
from scalellm_plugins.virtual.job import Policy


def test_policies_from_a_comma_list_and_repeated_options() -> None:
    assert policies.parse(["vllm, vllm-priority", "fair"]) == [
        Policy(label="vllm", ours=False),
        Policy(label="vllm-priority", ours=False, order="priority"),
        Policy(label="fair", ours=True, options={"policy": "fair"}),
    ]


def test_first_come_first_served_needs_no_name_in_the_options() -> None:
    (policy,) = policies.parse(["fcfs"])
    assert policy.ours
    assert policy.options.get("policy") in (None, "fcfs")


def test_several_in_one_are_joined_as_the_option_has_them() -> None:
    assert policies._named("priority+fair") == {"policy": "priority,fair"}


def test_options_for_all_and_for_one() -> None:
    one, other = policies.parse(["fair:enabled=false", "fair"], ["scheduler.enabled=true"])
    assert one.label == "fair:enabled=false"
    assert one.options == {"policy": "fair", "enabled": False}
    assert other.options == {"policy": "fair", "enabled": True}


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        (["fare"], [], r"--policy fare: scalellm\.scheduler\.policy: 'fare'.*vllm-priority"),
        (["fair,fair"], [], r"'fair' is given twice"),
        ([" , "], [], r"no policy is named"),
        (["fair:x=1"], [], r"scalellm\.scheduler\.x: unknown option"),
        (["fair:x"], [], r"--policy fair: 'x' is not KEY=VALUE"),
        (["vllm:x=1"], [], r"vllm is vLLM's own scheduler"),
        (["fair"], ["frontend.workers=2"], r"--set: 'frontend.workers=2': only options of"),
        (["fair"], ["scheduler.enabled"], r"--set: 'enabled' is not KEY=VALUE"),
    ],
)
def test_what_cannot_be_is_refused(texts: list[str], settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policies.parse(texts, settings)


def test_the_environment_of_a_run_names_its_plugins_and_is_strict() -> None:
    ours, theirs = policies.parse(["fair,vllm"])
    found = policies.environment(ours, {"gpu": "l4"})
    assert found["VLLM_PLUGINS"] == "scalellm.sim,scalellm.scheduler"
    options = json.loads(found["SCALELLM_CONFIG"])
    assert options == {"strict": True, "sim": {"gpu": "l4"}, "scheduler": {"policy": "fair"}}
    assert policies.environment(theirs, {})["VLLM_PLUGINS"] == "scalellm.sim"


# The clock


def module(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(source, made.__dict__)
    return made


def test_modules_below_the_packages_see_virtual_time_and_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = "import time\nfrom time import monotonic as now\ndef stamp(): return time.time()"
    inside = module("somewhere.deep", source, monkeypatch)
    outside = module("somewhere_else", source, monkeypatch)
    clock = VirtualClock()
    changed = install(VirtualTime(clock), ["somewhere"])
    assert sorted(changed) == ["somewhere.deep.now", "somewhere.deep.time"]
    before = inside.now(), inside.stamp()
    clock.sleep_until(3600.0)
    assert (inside.now() - before[0], inside.stamp() - before[1]) == (3600.0, 3600.0)
    assert inside.time.monotonic() == inside.now()
    assert outside.time is time
    assert outside.now is time.monotonic
    assert install(VirtualTime(clock), ["somewhere"]) == [], "once is enough"


def test_all_clocks_agree_and_sleeping_moves_them() -> None:
    clock = VirtualClock()
    virtual = VirtualTime(clock)
    virtual.sleep(2.5)
    assert clock.now() == 2.5
    assert virtual.monotonic_ns() == virtual.perf_counter_ns() == int(virtual.monotonic() * 1e9)
    assert virtual.time_ns() == int(virtual.time() * 1e9)
    assert abs(virtual.time() - virtual.monotonic()) > 1e8, "one taken for the other is found out"
    assert virtual.gmtime is time.gmtime
    assert set(CLOCKS) <= set(dir(VirtualTime))
