"""Stop strings: matches, kept tokens and held-back text, as vLLM has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scalellm_plugins.frontends.stops import StopText

DEMO_MODEL = Path(__file__).parents[1] / "examples" / "demo_model"

TEXTS = ["", "a", "b", "ab", "ba", "aab", "é", "b\n", "😀a", "c"]
"""What the tokens of `Letters` stand for; many ways to spell a stop string, and no text at all."""


class Letters:
    """A stream whose tokens are indices of TEXTS."""

    def feed(self, token_id: int) -> str:
        return TEXTS[token_id]


tokens = st.integers(0, len(TEXTS) - 1)
steps = st.lists(st.lists(tokens, max_size=5), max_size=8)
stop_sets = st.lists(st.text("abé\n😀", min_size=1, max_size=4), min_size=1, max_size=4)


def pushed(
    stop: Sequence[str], *steps: list[int], include_stop: bool = False, min_tokens: int = 0
) -> tuple[StopText, list[str | None]]:
    stops = StopText(stop, include_stop=include_stop, min_tokens=min_tokens)
    return stops, [stops.push(Letters(), step, stop_terminated=False) for step in steps]


def ids(*texts: str) -> list[int]:
    return [TEXTS.index(text) for text in texts]


def test_match_across_tokens_is_never_shown() -> None:
    stops = StopText(["aab"], include_stop=False, min_tokens=0)
    shown = []
    for text, match in [("c", None), ("a", None), ("a", None), ("b", "aab")]:
        assert stops.push(Letters(), ids(text), stop_terminated=False) == match
        shown.append(stops.delta(finished=match is not None))
    assert shown == ["", "", "c", ""]
    assert stops.text == "c"
    assert stops.num_tokens == 4


def test_included_stop_string_is_shown_at_once_and_nothing_behind_it() -> None:
    stops, matches = pushed(["aa"], ids("c"), ids("aab"), include_stop=True)
    assert matches == [None, "aa"]
    assert stops.delta(finished=True) == stops.text == "caa"


def test_what_was_held_back_comes_with_the_end() -> None:
    stops, _ = pushed(["abab"], ids("c", "ab"), ids("a"))
    assert stops.delta(finished=False) == "c"
    assert stops.delta(finished=False) == ""
    assert stops.delta(finished=True) == "aba"


@pytest.mark.parametrize(
    ("stop", "match", "text", "count"),
    [
        (["b", "a"], "a", "c", 2),  # "aab": its first letter completes first
        (["ba", "aab"], "aab", "c", 2),
        (["aab", "ab", "b"], "aab", "c", 2),  # all end together: the list's order
        (["b", "ab", "aab"], "b", "caa", 2),
        (["bab"], "bab", "caa", 3),  # and the last token of the step is not the answer's
    ],
)
def test_earliest_end_wins_within_a_step(
    stop: list[str], match: str, text: str, count: int
) -> None:
    stops, matches = pushed(stop, ids("c", "aab", "ab", "c"))
    assert matches == [match]
    assert (stops.text, stops.num_tokens) == (text, count)


def test_min_tokens_shield_what_ends_within_them() -> None:
    stops, matches = pushed(["ab"], ids("ab"), ids("a", "b", "c"), min_tokens=2)
    assert matches == [None, "ab"]  # begun in the second token, completed by the third
    assert (stops.text, stops.num_tokens) == ("ab", 3)


def test_stop_tokens_text_is_left_out_and_counted() -> None:
    stops = StopText(["c"], include_stop=False, min_tokens=0)
    assert stops.push(Letters(), ids("a", "c"), stop_terminated=True) is None
    assert (stops.text, stops.num_tokens) == ("a", 2)
    included = StopText(["c"], include_stop=True, min_tokens=0)
    assert included.push(Letters(), ids("a", "c"), stop_terminated=True) == "c"
    assert included.text == "ac"


def test_empty_step_changes_nothing() -> None:
    stops, matches = pushed(["a"], [], ids("b"), [])
    assert matches == [None, None, None]
    assert (stops.text, stops.num_tokens) == ("b", 1)


def upstream(stop: list[str], include_stop: bool, min_tokens: int, decode: Any) -> Any:
    """Return vLLM's own class over a function from token id to text."""
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer

    class Theirs(BaseIncrementalDetokenizer):
        decode_next = staticmethod(decode)

    params = SamplingParams(
        stop=stop, include_stop_str_in_output=include_stop, min_tokens=min_tokens
    )
    return Theirs(SimpleNamespace(sampling_params=params))


@cache
def upstream_drops_tokens_behind_a_stop() -> bool:
    """vLLM before 0.32 counts them, though their text is cut off."""
    theirs = upstream(["a"], False, 0, TEXTS.__getitem__)
    theirs.update(ids("a", "c"), False)
    return theirs.num_output_tokens() == 1


def assert_equal(
    theirs: Any, ours: StopText, stream: Any, steps: list[list[int]], last_stops: bool, every: int
) -> None:
    """Push the steps into both until one matches; ask for the text after each `every`-th."""
    for number, step in enumerate(steps, 1):
        terminated = last_stops and number == len(steps)
        match = theirs.update(step, terminated)
        assert ours.push(stream, step, stop_terminated=terminated) == match
        assert ours.text == theirs.get_next_output_text(finished=True, delta=False)
        if match is None or upstream_drops_tokens_behind_a_stop():
            assert ours.num_tokens == theirs.num_output_tokens()
        finished = match is not None or number == len(steps)
        if finished or number % every == 0:
            expected = theirs.get_next_output_text(finished=finished, delta=True)
            assert ours.delta(finished=finished) == expected
        if finished:
            break


@pytest.mark.vllm
@given(stop_sets, st.booleans(), st.integers(0, 8), steps, st.booleans(), st.integers(1, 4))
@example(["ab"], False, 2, [[3], [1, 2, 9]], False, 1)
def test_equals_vllm(
    stop: list[str],
    include: bool,
    min_tokens: int,
    steps: list[list[int]],
    last_stops: bool,
    every: int,
) -> None:
    theirs = upstream(stop, include, min_tokens, TEXTS.__getitem__)
    ours = StopText(stop, include_stop=include, min_tokens=min_tokens)
    assert_equal(theirs, ours, Letters(), steps, last_stops, every)


@cache
def demo_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))


@pytest.mark.vllm
@given(
    st.text("ab é😀\n.", max_size=30),
    st.lists(st.text("ab é😀\n.", min_size=1, max_size=3), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 4),
    st.integers(1, 4),
)
def test_equals_vllm_over_a_tokenizer(
    text: str, stop: list[str], include: bool, min_tokens: int, per_step: int
) -> None:
    """With characters torn over tokens, and over steps."""
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    from scalellm_plugins.frontends.detokenize import Detokenizer

    tokenizer = demo_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    params = SamplingParams(stop=stop, include_stop_str_in_output=include, min_tokens=min_tokens)
    request = SimpleNamespace(request_id="r", prompt_token_ids=[], sampling_params=params)
    theirs = FastIncrementalDetokenizer(SimpleNamespace(_tokenizer=tokenizer), request)
    ours = StopText(stop, include_stop=include, min_tokens=min_tokens)
    steps = [ids[start : start + per_step] for start in range(0, len(ids), per_step)]
    stream = Detokenizer.build(tokenizer).stream([])
    assert_equal(theirs, ours, stream, steps, last_stops=False, every=1)


@given(stop_sets, st.booleans(), st.lists(tokens, max_size=20), st.integers(1, 5))
def test_steps_of_several_tokens_equal_single_ones(
    stop: list[str], include: bool, answer: list[int], per_step: int
) -> None:
    """How the engine groups tokens changes neither the text nor the number of tokens."""

    def run(size: int) -> tuple[str | None, str, int, str]:
        stops = StopText(stop, include_stop=include, min_tokens=0)
        shown = ""
        for start in range(0, len(answer), size):
            step = answer[start : start + size]
            match = stops.push(Letters(), step, stop_terminated=False)
            if match is not None:
                return match, stops.text, stops.num_tokens, shown + stops.delta(finished=True)
            shown += stops.delta(finished=False)
        return None, stops.text, stops.num_tokens, shown + stops.delta(finished=True)

    match, text, count, shown = run(per_step)
    assert (match, text, count, shown) == run(1)
    assert shown == text, json.dumps(text)
