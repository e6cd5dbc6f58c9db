"""Segment cache: the ids of the plain path, whatever the added tokens are, within its bytes."""

from __future__ import annotations

import random
import re
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm_plugins.frontends import segments
from scalellm_plugins.frontends.cuts import AddedToken, choose_cuts, overlap, sample_texts
from scalellm_plugins.frontends.segments import ENTRY_BYTES, SegmentCache

SPECIALS = {"<|a|>": 1000, "<|b|>": 1001, "</s>": 1002}


class Toy:
    """A tokenizer in one line: code points, and specials wherever they stand in the text."""

    def __init__(self, specials: dict[str, int]) -> None:
        self.specials = specials
        longest_first = sorted(specials, key=len, reverse=True)
        self.pattern = re.compile("|".join([*map(re.escape, longest_first), "."]), re.DOTALL)
        self.calls: list[str] = []

    def __call__(self, text: str) -> list[int]:
        self.calls.append(text)
        found = self.pattern.findall(text)
        return [self.specials[t] if t in self.specials else ord(t) for t in found]


def ask(cache: SegmentCache, text: str) -> list[int]:
    plan = cache.plan(text)
    ids = plan.encode()
    plan.commit()
    return ids


def test_second_turn_tokenizes_only_the_new_messages() -> None:
    toy = Toy(SPECIALS)
    cache = SegmentCache(toy, SPECIALS, 1 << 20)
    first = "<|a|>system<|b|><|a|>question<|b|>"
    second = first + "<|a|>answer<|b|>"
    assert cache.plan(first).missing_chars == len("system") + len("question")
    ask(cache, first)
    toy.calls.clear()
    plan = cache.plan(second)
    assert plan.missing_chars == len("answer")
    assert plan.encode() == Toy(SPECIALS)(second)
    assert [call.removeprefix("<|a|>") for call in toy.calls] == ["answer"]


def test_conversations_share_a_system_prompt_before_it_is_committed_twice() -> None:
    toy = Toy(SPECIALS)
    cache = SegmentCache(toy, SPECIALS, 1 << 20)
    # Both planned before either is committed, as two requests in one turn of the loop are.
    plans = [cache.plan(f"<|a|>system<|b|>{user}") for user in ("x", "y")]
    for plan in plans:
        plan.encode()
        plan.commit()
    assert cache.stats.entries == 3
    assert cache.stats.bytes == held(cache)


def test_a_repeated_segment_is_tokenized_once() -> None:
    toy = Toy(SPECIALS)
    cache = SegmentCache(toy, SPECIALS, 1 << 20)
    text = "<|a|>same<|b|>same<|b|>same"
    plan = cache.plan(text)
    assert plan.missing_chars == len("same")
    assert plan.encode() == plan.encode() == Toy(SPECIALS)(text)
    assert len(toy.calls) == 1


def test_encode_returns_a_list_of_the_callers_own() -> None:
    cache = SegmentCache(Toy(SPECIALS), SPECIALS, 1 << 20)
    ask(cache, "<|a|>text").append(7)
    assert ask(cache, "<|a|>text") == Toy(SPECIALS)("<|a|>text")


def test_surrounding_ids_are_added_to_known_and_unknown_text() -> None:
    cache = SegmentCache(Toy(SPECIALS), SPECIALS, 1 << 20)
    for _ in range(2):
        plan = cache.plan("head<|a|>x", (5, 6), (7,))
        assert plan.encode() == [5, 6, *Toy(SPECIALS)("head<|a|>x"), 7]
        plan.commit()


def held(cache: SegmentCache) -> int:
    return sum(
        sys.getsizeof(key[0] if isinstance(key, tuple) else key) + sys.getsizeof(ids) + ENTRY_BYTES
        for key, ids in cache._table.items()
    )


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 60)), max_size=60),
    st.integers(0, 6000),
)
def test_bytes_are_exact_and_bounded(requests: list[tuple[int, int]], bound: int) -> None:
    cache = SegmentCache(Toy(SPECIALS), SPECIALS, bound)
    for number, repeats in requests:
        text = f"<|a|>{number}" + "é" * repeats
        assert ask(cache, text) == Toy(SPECIALS)(text)
        assert cache.stats.bytes == held(cache) <= bound


def test_least_recently_used_goes_first() -> None:
    size = sys.getsizeof("x" * 50) + sys.getsizeof((0,) * 50) + ENTRY_BYTES
    cache = SegmentCache(Toy(SPECIALS), SPECIALS, size * 4)
    for letter in "abcd":
        ask(cache, "<|a|>" + letter * 50)
    ask(cache, "<|a|>" + "a" * 50)  # now b is the oldest
    ask(cache, "<|a|>" + "e" * 50)
    known = [c for c in "abcde" if cache.plan("<|a|>" + c * 50).missing_chars == 0]
    assert known == ["a", "c", "d", "e"]


def test_one_huge_segment_does_not_flush_the_others() -> None:
    cache = SegmentCache(Toy(SPECIALS), SPECIALS, 10_000)
    ask(cache, "<|a|>small")
    ask(cache, "<|a|>" + "x" * 5000)
    assert cache.plan("<|a|>small").missing_chars == 0
    assert cache.stats.entries == 1


def test_an_evicted_segment_still_serves_the_plan_that_found_it() -> None:
    cache = SegmentCache(Toy(SPECIALS), SPECIALS, 4000)
    ask(cache, "<|a|>early")
    plan = cache.plan("<|a|>early<|b|>")
    for number in range(100):
        ask(cache, f"<|a|>{number}")
    assert cache.plan("<|a|>early").missing_chars == 5
    assert plan.encode() == Toy(SPECIALS)("<|a|>early<|b|>")


def test_more_cuts_than_the_bound_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MAX_CUTS", 3)
    cache = SegmentCache(Toy(SPECIALS), SPECIALS, 1 << 20)
    text = "<|a|>x<|b|>y" * 50
    assert len(cache.plan(text)._parts) < 12
    assert ask(cache, text) == ask(cache, text) == Toy(SPECIALS)(text)


# Tokens that contain, extend and run into each other.
CROSSING = {"<|a|>": 1, "<|a|>x": 2, "|><|": 3, "<|": 4, "a": 5, "></": 6, "</s>": 7, "[X]": 8}


@given(st.text("<|a>x/s[X] ", max_size=40), st.sets(st.sampled_from(sorted(CROSSING)), min_size=1))
@settings(max_examples=500)
def test_overlapping_tokens_are_matched_leftmost_longest(text: str, wanted: set[str]) -> None:
    toy = Toy(CROSSING)
    cuts = choose_cuts([AddedToken(t, i) for t, i in CROSSING.items()], wanted.__contains__)
    cache = SegmentCache(toy, cuts.specials, 1 << 20, opaque=cuts.opaque)
    assert ask(cache, text) == ask(cache, text) == toy(text)


def test_tokens_that_cannot_meet_a_cut_are_not_searched_for() -> None:
    added = [
        AddedToken("<|a|>", 1),
        AddedToken("[X]", 2),
        AddedToken("|>|", 3),
        AddedToken("|y", 4),
    ]
    cuts = choose_cuts(added, "<|a|>".__eq__)
    # "|y" meets no cut itself, but may take the "|" away from "|>|", which does.
    assert set(cuts.opaque) == {"|>|", "|y"}


def test_whitespace_is_no_place_to_split() -> None:
    # Gemma has tokens for runs of newlines, and a template's rendering contains them.
    added = [AddedToken("<|a|>", 1), AddedToken("\n", 2), AddedToken(" x", 3)]
    assert set(choose_cuts(added, lambda token: True).specials) == {"<|a|>"}


@given(st.text("ab", min_size=1, max_size=4), st.text("ab", min_size=1, max_size=4))
def test_overlap_is_what_some_text_shows(a: str, b: str) -> None:
    shows = b in a or any(a[-n:] == b[:n] for n in range(1, min(len(a), len(b) + 1)))
    assert overlap(a, b) == shows


def test_check_finds_a_tokenizer_that_sees_across_special_tokens() -> None:
    plain = Toy(SPECIALS)

    def looks_back(text: str) -> list[int]:
        """Another id for a digit behind a special token: any special token serves as context."""
        ids = plain(text)
        return [
            i + 1 if i == ord("2") and before > 999 else i
            for before, i in zip([0, *ids], ids, strict=False)
        ]

    def counts(text: str) -> list[int]:
        """Something that depends on the whole prompt, in long ones."""
        ids = plain(text)
        return [*ids[:-1], len(ids)] if len(ids) > 30 else ids

    texts = sample_texts(random.Random(1), list(SPECIALS), list(SPECIALS), 2000)
    for tokenizer, exact in ((plain, True), (looks_back, True), (counts, False)):
        cache = SegmentCache(tokenizer, SPECIALS, 1 << 20)
        wrong = cache.check(tokenizer, texts, 60)
        assert (wrong is None) == exact
        assert cache.stats.entries == cache.stats.bytes == cache.stats.misses == 0


def test_turned_off_tokenizes_whole_and_keeps_nothing() -> None:
    toy = Toy(SPECIALS)
    cache = SegmentCache(toy, SPECIALS, 1 << 20)
    ask(cache, "<|a|>x")
    cache.turn_off("because")
    toy.calls.clear()
    assert ask(cache, "<|a|>x<|b|>y") == Toy(SPECIALS)("<|a|>x<|b|>y")
    assert toy.calls == ["<|a|>x<|b|>y"]
    assert (cache.stats.entries, cache.stats.bytes) == (0, 0)


def test_nothing_to_split_at_is_off() -> None:
    assert SegmentCache(Toy({}), {}, 1000).off
    assert SegmentCache(Toy(SPECIALS), SPECIALS, 1000, rstrip=SPECIALS).off


# Real tokenizers, built here: every family of pre-tokenizer and every flag of added tokens.

tokenizers = pytest.importorskip("tokenizers")
CORPUS = [
    "Hello world, the quick brown fox",
    "def f(x): return x + 1",
    "naïve café 中文 🙂 2026",
] * 3


def byte_level(prefix_space: bool, regex: bool) -> Any:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=prefix_space)
    if regex:
        pattern = tokenizers.Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+| ?\p{L}+")
        tokenizer.pre_tokenizer = pre.Sequence(
            [pre.Split(pattern, "isolated"), pre.ByteLevel(prefix_space, use_regex=False)]
        )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace(scheme: str, model: str) -> Any:
    if model == "unigram":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=200, special_tokens=["<unk>"], show_progress=False
        )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def normalizing(*names: str) -> Any:
    tokenizer = byte_level(False, False)
    normalizers = tokenizers.normalizers
    tokenizer.normalizer = normalizers.Sequence([getattr(normalizers, name)() for name in names])
    return tokenizer


def legacy_llama() -> Any:
    tokenizer = metaspace("always", "bpe")
    normalizers = tokenizers.normalizers
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


FAMILIES = {
    "gpt2": lambda: byte_level(False, False),
    "gpt2-prefix-space": lambda: byte_level(True, False),
    "llama3": lambda: byte_level(False, True),
    **{
        f"metaspace-{scheme}-{model}": (lambda scheme=scheme, model=model: metaspace(scheme, model))
        for scheme in ("first", "always", "never")
        for model in ("bpe", "unigram")
    },
    "nfkc-lowercase": lambda: normalizing("NFKC", "Lowercase"),
    "strip": lambda: normalizing("Strip"),
    "legacy-llama": legacy_llama,
}
FLAGS: dict[str, list[dict[str, Any]]] = {
    "plain": [{}],
    "lstrip": [{}, {"lstrip": True}],
    "rstrip": [{}, {"rstrip": True}],
    "both-strips": [{}, {"lstrip": True, "rstrip": True}],
    "single-word": [{}, {"single_word": True}],
    "normalized": [{}, {"normalized": True}],
}
# With words and signs at their edges, one inside another, and (odd ones) of whitespace.
CONTENTS = ["<|im|>", "<s>", "[INST]", "</s>", "Q", "<|im|>!", "word<", "|><"]
WHITE = ["\n\n", " \n"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param, FAMILIES[request.param]().to_str()


@pytest.mark.parametrize("white", [False, True], ids=["", "whitespace-tokens"])
@pytest.mark.parametrize("flags", FLAGS)
def test_ids_of_a_real_tokenizer_do_not_change(
    family: tuple[str, str], flags: str, white: bool
) -> None:
    if (family[0], flags, white) == ("strip", "normalized", True):
        pytest.skip("the library itself panics on a token that its normalizer makes empty")
    tokenizer = tokenizers.Tokenizer.from_str(family[1])
    contents = CONTENTS + WHITE * white
    variants = FLAGS[flags]
    added = [
        tokenizers.AddedToken(
            content, **{"normalized": False, "special": True, **variants[i % len(variants)]}
        )
        for i, content in enumerate(contents)
    ]
    tokenizer.add_special_tokens(added)

    def plain(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    raw = [
        AddedToken(token.content, number, token.lstrip, token.rstrip, token.single_word)
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if not token.normalized
    ]
    cuts = choose_cuts(raw, lambda token: token in contents)
    assert cuts.specials  # or nothing is tested
    cache = SegmentCache(
        plain, cuts.specials, 1 << 20, lstrip=cuts.lstrip, rstrip=cuts.rstrip, opaque=cuts.opaque
    )
    assert cache.off is None
    seed = random.Random(f"{flags}{white}")
    texts = sample_texts(seed, list(cuts.specials), [*contents, "<unk>"], 700)
    for text in texts:
        assert ask(cache, text) == plain(text), text
    assert cache.stats.hits > 100
