"""Ids by word: those of the tokenizer, for every pre-tokenizer that is said to split at spaces."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from scalellm_plugins.frontends import words as words_module
from scalellm_plugins.frontends.cuts import FRAGMENTS
from scalellm_plugins.frontends.words import Words, boundary_splits

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA.replace("{1,3}", "")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_ENDING}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_ENDING}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TRAINING = ["the green garden, don't you see? x=1; for i in range(10):\n    print(i)"] * 4 + [
    "Hello World 3.14159 2026 ab abc abcd the then there — naïve café 中文 字\n\n\tend "
] * 4


def split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


KINDS: dict[str, Any] = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama": split_by(LLAMA),
    "qwen": split_by(QWEN),
    "o200k": split_by(O200K),
    "digits": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex("[-+*/=]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}


def tokenizer(kind: str) -> Tokenizer:
    made = Tokenizer(BPE())
    made.pre_tokenizer = KINDS[kind]
    if kind == "qwen":
        made.normalizer = normalizers.NFC()
    if kind == "gpt2":
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TRAINING, trainer)
    made.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return made


MADE = {kind: tokenizer(kind) for kind in KINDS}


def words_of(kind: str) -> Words:
    rust = MADE[kind]
    return Words(lambda text: rust.encode(text, add_special_tokens=False).ids, rust)


SHARED = {kind: words_of(kind) for kind in KINDS}
"""One per kind for all examples: what one text has taught is used for the next."""

PIECES = st.sampled_from([*FRAGMENTS, "<|end|>", "<|", "the", "garden", "don't", "'S", "/\n"])
TEXTS = st.one_of(
    st.lists(PIECES, max_size=12).map("".join),
    st.lists(PIECES, max_size=12).map(" ".join),
    st.text(max_size=20),
    st.lists(st.text(max_size=4), max_size=6).map(" ".join),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_ids_are_the_tokenizers(kind: str, text: str) -> None:
    right = MADE[kind].encode(text, add_special_tokens=False).ids
    assert SHARED[kind](text) == right
    assert SHARED[kind](text) == right  # now from the table


@pytest.mark.parametrize("kind", KINDS)
def test_known_pre_tokenizers_split_at_spaces(kind: str) -> None:
    assert boundary_splits(MADE[kind])
    assert words_of(kind).check(random.Random(0), FRAGMENTS) is None


def test_known_words_need_no_tokenizer() -> None:
    words = words_of("llama")
    words("the green garden")
    calls: list[str] = []
    words._encode = lambda text: calls.append(text) or []  # type: ignore[func-returns-value]
    words._rust = None
    assert words("the garden green green") == MADE["llama"].encode("the garden green green").ids
    assert not calls


def changed(kind: str, change: Any) -> Tokenizer:
    made = Tokenizer.from_str(MADE[kind].to_str())
    change(made)
    return made


REFUSED: dict[str, Any] = {
    "no pre-tokenizer": lambda made: setattr(made, "pre_tokenizer", None),
    "Metaspace": lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.Metaspace()),
    "a prefix space": lambda made: setattr(
        made, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "another pattern": lambda made: setattr(made, "pre_tokenizer", split_by(r"\w+ \w+|\s+")),
    "no pattern for spaces": lambda made: setattr(made, "pre_tokenizer", split_by(r"\p{N}")),
    "single characters only": lambda made: setattr(
        made,
        "pre_tokenizer",
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False, use_regex=False)]
        ),
    ),
    "a set with the space": lambda made: setattr(
        made,
        "pre_tokenizer",
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex("[\t-~]"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
    ),
    "a normalizer": lambda made: setattr(made, "normalizer", normalizers.Strip()),
    "a token with a space": lambda made: made.add_tokens([AddedToken("of the", normalized=False)]),
    "a token that strips": lambda made: made.add_tokens([AddedToken("<x>", lstrip=True)]),
    "a token that is a word": lambda made: made.add_tokens([AddedToken("x", single_word=True)]),
}


@pytest.mark.parametrize("why", REFUSED)
def test_others_are_refused(why: str) -> None:
    assert not boundary_splits(changed("gpt2", REFUSED[why]))


def test_the_check_finds_a_tokenizer_that_merges_over_spaces() -> None:
    rust = Tokenizer(BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=260, initial_alphabet=alphabet, show_progress=False)
    rust.train_from_iterator(["a a a a a 中 a x", "hello a user a"], trainer)
    words = Words(lambda text: rust.encode(text, add_special_tokens=False).ids, rust)
    assert words.check(random.Random(0), FRAGMENTS) is not None
    assert not len(words)


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "MOST_WORDS", 10)
    words = words_of("gpt2")
    for number in range(40):
        text = f"a{number} b{number} c{number} {'x' * 60}"
        assert words(text) == MADE["gpt2"].encode(text).ids
        assert len(words) <= 10
