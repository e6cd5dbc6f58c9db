"""What a tenant's entry makes of its requests."""

from __future__ import annotations

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.frontends.bound import Bound
from scalellm_plugins.frontends.tenants import Tenant
from scalellm_plugins.scheduling.terms import DEADLINE, SAID, TENANT, TPOT, TTFT, WEIGHT

WHOLE = Tenant(
    name="acme",
    weight=2.0,
    max_running=3,
    kv_floor=0.0,
    kv_ceiling=0.5,
    tokens_per_minute=9,
    ttft_ms=400.0,
    tpot_ms=40.0,
)
LIMITS = {
    "scalellm_max_running": 3,
    "scalellm_kv_floor": 0.0,
    "scalellm_kv_ceiling": 0.5,
    "scalellm_tokens_per_minute": 9,
}


def test_what_the_engine_is_told() -> None:
    assert Bound(Tenant(name="a")).extra == {TENANT: "a", WEIGHT: 1.0}
    told = {TENANT: "acme", WEIGHT: 2.0, TTFT: 400.0, TPOT: 40.0}
    assert Bound(WHOLE).extra == {**told, **LIMITS}
    assert Bound(WHOLE).key == Bound(WHOLE).key
    assert Bound(WHOLE).key != Bound(Tenant(name="acme")).key


def test_what_a_request_may_choose_itself() -> None:
    said = dict.fromkeys(SAID, 1) | LIMITS
    assert set(Bound(WHOLE).own(said)) == {DEADLINE, TTFT, TPOT}
    assert set(Bound(Tenant(name="a")).own(dict.fromkeys(SAID, 1))) == {DEADLINE, TTFT, TPOT}


NAMES = st.text(st.sampled_from("ab:.@_-"), min_size=1, max_size=4)
SALTS = st.one_of(
    st.none(),
    st.text(st.sampled_from("ab/:.\ud800"), min_size=1, max_size=5),
    # As if a client had found out another's.
    st.builds(lambda name, salt: isolated(name).salted(salt), NAMES, st.sampled_from([None, "a"])),
)


def isolated(name: str) -> Bound:
    return Bound(Tenant(name=name, isolate_prefix=True))


@given(st.lists(st.tuples(NAMES, st.booleans(), SALTS), min_size=2, max_size=12))
def test_nobody_shares_a_prefix_with_an_isolated_tenant(
    requests: list[tuple[str, bool, str | None]],
) -> None:
    for one, other in itertools.combinations(requests, 2):
        (name, alone, salt), (other_name, other_alone, other_salt) = one, other
        if name == other_name and alone != other_alone:
            continue  # one tenant is isolated or not
        salts = [
            Bound(Tenant(name=who, isolate_prefix=by_itself)).salted(what)
            for who, by_itself, what in (one, other)
        ]
        if name == other_name or not (alone or other_alone):
            assert (salts[0] == salts[1]) == (salt == other_salt), "its own salts still tell apart"
        else:
            assert salts[0] != salts[1]


def test_salts_are_valid_to_vllm() -> None:
    """Which allows 128 characters, and no @ or slash."""
    for salt in (None, "x", "y" * 128):
        made = isolated("team@acme:eu").salted(salt)
        assert made is not None
        assert re.fullmatch(r"scalellm\.[0-9a-f]{64}", made)
    assert Bound(Tenant(name="a")).salted(None) is None
    assert Bound(Tenant(name="a")).salted("mine") == "mine"
