"""The text of the demo model: repeatable, truthful, and held-out questions never in training."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TRAINING_SAMPLE = 20_000  # conversations looked at, about 50 000 questions


def load_example(name: str) -> ModuleType:
    """Import a script of `examples/` by its path."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


demo_text = load_example("demo_text")


@pytest.fixture(scope="module")
def training() -> list[list[dict[str, str]]]:
    return list(islice(demo_text.training_conversations(seed=3), TRAINING_SAMPLE))


@pytest.fixture(scope="module")
def held_out() -> list:
    return demo_text.held_out_examples()


def pairs(conversations: list[list[dict[str, str]]]) -> list[tuple[str, str]]:
    """Return all (question, answer) pairs of conversations."""
    return [
        (first["content"], second["content"])
        for messages in conversations
        for first, second in pairwise(messages)
        if first["role"] == "user"
    ]


def test_the_same_seed_gives_the_same_text():
    one = list(islice(demo_text.training_conversations(seed=5), 200))
    two = list(islice(demo_text.training_conversations(seed=5), 200))
    other = list(islice(demo_text.training_conversations(seed=6), 200))
    assert one == two
    assert one != other


def test_the_held_out_set_is_large_fixed_and_of_every_category(held_out):
    assert len(held_out) >= 500
    assert held_out == demo_text.held_out_examples()
    assert {example.category for example in held_out} == set(demo_text.CATEGORIES)
    questions = {demo_text.normalise(e.messages[-1]["content"]) for e in held_out}
    assert len(questions) == len(held_out)


def test_no_held_out_question_is_in_the_training_text(training, held_out):
    asked = {demo_text.normalise(question) for question, _ in pairs(training)}
    assert len(asked) > 10_000
    wanted = {demo_text.normalise(e.messages[-1]["content"]) for e in held_out}
    assert not asked & wanted


def test_earlier_turns_of_held_out_conversations_are_no_held_out_questions(held_out):
    wanted = demo_text.held_out_questions()
    for example in held_out:
        earlier = [m["content"] for m in example.messages[:-1] if m["role"] == "user"]
        assert not {demo_text.normalise(question) for question in earlier} & wanted


def test_no_held_out_pair_of_numbers_is_added_in_training(training, held_out):
    def sums(answers: list[str]) -> set[str]:
        return {a for a in answers if re.fullmatch(r"\d+ [+-] \d+ = -?\d+\.", a)}

    taught = sums([answer for _, answer in pairs(training)])
    judged = sums([e.answer for e in held_out])
    assert len(judged) >= 50
    assert not taught & judged


def test_every_category_occurs_in_training():
    rng = random.Random(0)
    for category in demo_text.CATEGORIES:
        item = demo_text.draw(category, rng, held_out=False)
        assert item.category == category
        assert not demo_text.is_held_out(item.key)


def test_sums_are_right(training, held_out):
    answers = [answer for _, answer in pairs(training)] + [e.answer for e in held_out]
    operations = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}
    found = [re.fullmatch(r"(\d+) ([+x-]) (\d+) = (-?\d+)\.", answer) for answer in answers]
    found = [match for match in found if match]
    assert {match[2] for match in found} == {"+", "-", "x"}
    for match in found:
        assert operations[match[2]](int(match[1]), int(match[3])) == int(match[4]), match[0]


def test_answers_about_numbers_use_the_numbers_of_the_question(training):
    for question, answer in pairs(training):
        asked = re.findall(r"\d+", question)
        match = re.fullmatch(r"(\d+) [+x-] (\d+) = -?\d+\.", answer)
        if match and len(asked) == 2:  # else a number was written as a word
            assert asked == [match[1], match[2]], question


def test_comparisons_are_right(training):
    pattern = r"(\d+) is (larger|smaller) than (\d+)(?:, so (yes|no))?\."
    found = [(q, re.fullmatch(pattern, a)) for q, a in pairs(training)]
    found = [(q, match) for q, match in found if match]
    assert len(found) > 100
    for question, match in found:
        assert (int(match[1]) > int(match[3])) == (match[2] == "larger"), match[0]
        if match[4]:
            asks_smaller = re.search("smaller|less|lower", question, re.IGNORECASE)
            assert (match[4] == "yes") == ((match[2] == "smaller") == bool(asks_smaller)), question


def test_counting_runs_from_the_first_to_the_last_number(training):
    found = 0
    for question, answer in pairs(training):
        match = re.fullmatch(r"From (\d+) (?:up|down) to (\d+): (\d+(?:, \d+)+)\.", answer)
        if not match:
            continue
        found += 1
        numbers = [int(n) for n in match[3].split(", ")]
        assert [int(match[1]), int(match[2])] == [numbers[0], numbers[-1]]
        step = 1 if numbers[-1] > numbers[0] else -1
        assert numbers == list(range(numbers[0], numbers[-1] + step, step))
        asked = [int(n) for n in re.findall(r"\d+", question)]
        assert asked in ([numbers[0], numbers[-1]], [numbers[-1]]), question
    assert found > 100


def test_spelling_and_lengths_are_right(training):
    answers = [answer for _, answer in pairs(training)]
    spelled = [m for a in answers if (m := re.fullmatch(r"(\w+) is spelled ([\w-]+)\.", a))]
    counted = [m for a in answers if (m := re.fullmatch(r"The word (\w+) has (\d+) letters\.", a))]
    assert spelled
    assert counted
    assert all(match[1] == match[2].replace("-", "") for match in spelled)
    assert all(len(match[1]) == int(match[2]) for match in counted)


def test_a_name_is_remembered(training):
    known = 0
    for messages in training:
        name = None
        for question, answer in pairs([messages]):
            if match := re.fullmatch(r"Nice to meet you, (\w+)!", answer):
                name = match[1]
                assert name.lower() in question.lower()
            elif match := re.fullmatch(r"Your name is (\w+)\.", answer):
                known += 1
                assert match[1] == name
    assert known > 100


def test_conversations_alternate_and_hold_no_special_tokens(training):
    for messages in training:
        roles = [message["role"] for message in messages]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert not any("<|" in message["content"] for message in messages)


def test_some_conversations_have_several_turns_and_some_a_system_message(training):
    share = 1 / len(training)
    assert 0.15 < share * sum(m[0]["role"] == "system" for m in training) < 0.35
    assert 0.3 < share * sum(len(m) > 3 for m in training) < 0.7


def test_normalise_ignores_casing_punctuation_and_spacing_but_not_signs():
    assert demo_text.normalise("What is 3+4?") == demo_text.normalise("what IS 3 + 4")
    assert demo_text.normalise("3 + 4") != demo_text.normalise("3 - 4")
