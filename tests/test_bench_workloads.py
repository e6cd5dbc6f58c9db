"""Prompts: of the length that was meant, each its own."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from scalellm_plugins.benchmarks.workloads import (
    WORKLOADS,
    Body,
    Prompts,
    Template,
    Texts,
    Workload,
    words_of,
    workload_named,
)
from scalellm_plugins.errors import ConfigError

WORDS = [f"{a}{b}{c}" for a in "bcdfghlmn" for b in "aeiou" for c in "klmnprst"]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer, trained on a few hundred made-up words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS) + " a"] * 3, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def count(folder: Path, text: str) -> int:
    return len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)


def test_words_are_one_token_each(tokenizer_dir: Path) -> None:
    words = words_of(tokenizer_dir)
    assert len(words) == len(set(words)) >= 64
    start = count(tokenizer_dir, "a")
    assert all(count(tokenizer_dir, f"a {word}") == start + 1 for word in words)


@pytest.mark.parametrize("length", [1, 5, 128, 8192])
def test_texts_have_their_length(tokenizer_dir: Path, length: int) -> None:
    texts = Texts(words_of(tokenizer_dir), seed=3)
    assert count(tokenizer_dir, texts.text(length)) == length
    assert count(tokenizer_dir, texts.fixed(length)) == length


@given(st.integers(0, 2**31), st.integers(30, 2000))
def test_no_two_texts_begin_alike(seed: int, length: int) -> None:
    texts = Texts(WORDS, seed)
    # 16 tokens are the smallest block that the prefix cache shares; the template takes some.
    beginnings = [tuple(texts.text(length).split()[:13]) for _ in range(50)]
    assert len(set(beginnings)) == len(beginnings)


def test_seeds_repeat_and_differ() -> None:
    assert Texts(WORDS, 1).text(50) == Texts(WORDS, 1).text(50)
    assert Texts(WORDS, 1).text(50) != Texts(WORDS, 2).text(50)


def test_a_text_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="the longest is"):
        Texts(WORDS, 1).text(10**6)


def requests(workload: Workload, template: Template, index: int, streams: int, number: int):
    prompts = Prompts(workload, Texts(WORDS, 0), template, Body("m", True), index, streams)
    for _ in range(number):
        body = json.loads(prompts.next(b"an answer"))
        yield body, prompts.expected_prompt, prompts.expected_output


def test_single_requests() -> None:
    template = Template(base=9)
    got = list(requests(WORKLOADS["short"], template, 3, 4, 3))
    for body, expected_prompt, expected_output in got:
        (message,) = body["messages"]
        assert message["role"] == "user"
        assert len(message["content"].split()) + template.base == expected_prompt == 128
        assert body["max_tokens"] == expected_output
        assert body["ignore_eos"]
        assert body["stream_options"] == {"include_usage": True}
    assert [expected for *_, expected in got] == [128, 128, 128]


def test_first_requests_are_spread_over_the_cycle() -> None:
    firsts = [
        next(requests(WORKLOADS["short"], Template(9), index, 64, 1))[2] for index in range(64)
    ]
    assert firsts == [2 * (index + 1) for index in range(64)]


def test_conversations_grow_and_start_again() -> None:
    chat = WORKLOADS["chat"]
    got = list(requests(chat, Template(base=9, system=4), 3, 4, 5))
    roles = [[message["role"] for message in body["messages"]] for body, *_ in got]
    one = ["system", "user"]
    assert [len(turn) for turn in roles] == [2, 4, 6, 8, 2]
    assert roles[1] == [*one, "assistant", "user"]
    first, second = got[0][0]["messages"], got[1][0]["messages"]
    assert second[: len(first)] == first
    assert second[2]["content"] == "an answer"
    assert [expected for _, expected, _ in got] == [192, None, None, None, 192]
    assert len(first[0]["content"].split()) + 4 == chat.system
    assert got[4][0]["messages"][0] == first[0]


def test_unstreamed_requests_ask_for_no_stream() -> None:
    prompts = Prompts(WORKLOADS["short"], Texts(WORDS, 0), Template(9), Body("m", False), 0, 1)
    body = json.loads(prompts.next(b""))
    assert body["stream"] is False
    assert "stream_options" not in body


def test_first_conversations_differ_in_length() -> None:
    def turns(index: int) -> int:
        got = requests(WORKLOADS["chat"], Template(9), index, 8, 5)
        lengths = [len(body["messages"]) for body, *_ in islice(got, 5)]
        return lengths.index(2, 1)

    assert [turns(index) for index in range(5)] == [1, 2, 3, 4, 1]


def test_unknown_workload() -> None:
    with pytest.raises(ConfigError, match=r"--workloads: 'shrot' is unknown. Valid: short"):
        workload_named("shrot")


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tokenizer: .* holds no tokenizer.json"):
        words_of(tmp_path)


def test_too_few_words(tmp_path: Path) -> None:
    vocabulary = {letter: number for number, letter in enumerate("abcd ")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="words that are one token each; 64 are needed"):
        words_of(tmp_path)
