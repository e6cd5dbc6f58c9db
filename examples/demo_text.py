"""Seeded generator of the conversations that the demo model learns and is judged on.

Every question is an *item*: a category, a filled question template, its answer, and a split key.
The key's hash decides, once for all, whether the item belongs to the training text or to the
held-out set, so a held-out question never occurs in training in any casing, punctuation or
wrapping. For additions and subtractions the key is the pair of numbers: no held-out pair occurs
in training in *any* phrasing. For introductions it is the name. For all else the key is the
question as it is phrased: the fact is taught, this way of asking for it is not.

The questions are drawn in `demo_questions.py` from the tables in `demo_facts.py`; nothing is
downloaded. Example:

    python examples/demo_text.py --count 5 --seed 1
    python examples/demo_text.py --count 2000 --jsonl > chats.jsonl  # for `scalellm compress`
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# The examples are plain scripts, also loaded by path: make their neighbour importable.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo_facts as facts
from demo_questions import CATEGORIES, DRAW, WEIGHTS, Item, name_in, normalise

HELD_OUT_SHARE = 0.1  # share of split keys that are never used in training
HELD_OUT_SEED = 20240607  # fixes the held-out set, whatever seed the training uses
HELD_OUT_PER_CATEGORY = 40

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A held-out task: `messages` ends with a user message whose only right reply is `answer`."""

    category: str
    messages: list[Message]
    answer: str


def is_held_out(key: str) -> bool:
    """Say whether the split key belongs to the held-out set (a hash, the same on any machine)."""
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def decorate(question: str, rng: random.Random) -> str:
    """Vary wrapping, casing and final punctuation, as people do."""
    if rng.random() < 0.25:
        head = question if question[:2].isupper() else question[0].lower() + question[1:]
        question = rng.choice(facts.PREFIXES) + head
    if rng.random() < 0.12:
        question = question.rstrip("?.! ") + rng.choice(facts.SUFFIXES)
    if rng.random() < 0.25:
        question = question.lower()
    if rng.random() < 0.25:
        question = question.rstrip("?.! ")
    return question


def draw(category: str, rng: random.Random, held_out: bool) -> Item:
    """Draw one decorated item of a category from the wanted side of the split."""
    banned = frozenset() if held_out else held_out_questions()
    while True:
        item = DRAW[category](rng)
        if is_held_out(item.key) != held_out:
            continue
        question = decorate(item.question, rng)
        # Two different templates can meet once decorated: such a question stays held out.
        if held_out or normalise(question) not in banned:
            answer = item.answer
            if category == "names":  # a name is repeated as it was typed
                name = name_in(answer)
                answer = answer if name in question else answer.replace(name, name.lower())
            return Item(category, question, answer, item.key, item.needs)


class _Chat:
    """A conversation in the making; remembers the user's name so that answers stay true."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.name, self.messages = rng, "", []
        if rng.random() < 0.25:
            self.messages.append({"role": "system", "content": rng.choice(facts.SYSTEM_MESSAGES)})

    def add(self, item: Item) -> None:
        """Append a question with its answer, and before it what the question refers to."""
        if item.needs and not (item.needs == "names" and self.name):
            self.add(draw(item.needs, self.rng, held_out=False))
            if item.needs == "names" and self.rng.random() < 0.5:
                self.add(draw(_plain_category(self.rng), self.rng, held_out=False))
        answer = item.answer
        if item.category == "names":
            self.name = name_in(answer)
        elif item.category == "memory":
            answer = f"Your name is {self.name}." if self.name else facts.NO_NAME
        self.messages.append({"role": "user", "content": item.question})
        self.messages.append({"role": "assistant", "content": answer})


def _any_category(rng: random.Random) -> str:
    return rng.choices(CATEGORIES, [WEIGHTS.get(name, 1.0) for name in CATEGORIES])[0]


def _plain_category(rng: random.Random) -> str:
    """Draw a category whose questions stand on their own."""
    return rng.choice([name for name in CATEGORIES if name not in ("names", "memory", "followup")])


def training_conversations(seed: int) -> Iterator[list[Message]]:
    """Yield conversations without end, none with a held-out question; same seed, same text."""
    rng = random.Random(seed)
    while True:
        chat = _Chat(rng)
        turns = rng.choices((1, 2, 3, 4, rng.randint(5, 14)), (50, 22, 14, 8, 6))[0]
        for _ in range(turns):
            chat.add(draw(_any_category(rng), rng, held_out=False))
        yield chat.messages


@lru_cache(maxsize=1)
def _held_out_items() -> tuple[Item, ...]:
    rng = random.Random(HELD_OUT_SEED)
    items: dict[str, Item] = {}
    for category in CATEGORIES:
        goal = len(items) + HELD_OUT_PER_CATEGORY
        for _ in range(200_000):
            item = draw(category, rng, held_out=True)
            items.setdefault(normalise(item.question), item)
            if len(items) == goal:
                break
        else:
            raise RuntimeError(f"category {category!r} has too few held-out questions")
    return tuple(items.values())


@lru_cache(maxsize=1)
def held_out_questions() -> frozenset[str]:
    """Return the normalised held-out questions, which training must never show."""
    return frozenset(normalise(item.question) for item in _held_out_items())


def held_out_examples() -> list[Example]:
    """Return the held-out set, always the same; a third are asked late in a conversation."""
    rng = random.Random(HELD_OUT_SEED + 1)
    examples = []
    for item in _held_out_items():
        chat = _Chat(rng)
        if rng.random() < 0.33:
            for _ in range(rng.randint(1, 3)):
                chat.add(draw(_any_category(rng), rng, held_out=False))
        chat.add(item)
        answer = chat.messages.pop()["content"]
        examples.append(Example(item.category, chat.messages, answer))
    return examples


def main() -> None:
    """Print sample conversations."""
    parser = argparse.ArgumentParser(description="Print conversations the demo model learns from.")
    parser.add_argument("--count", type=int, default=5, help="how many conversations (default 5)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the text (default 1)")
    parser.add_argument("--jsonl", action="store_true", help="one conversation per line, as JSON")
    args = parser.parse_args()
    for _, messages in zip(range(args.count), training_conversations(args.seed), strict=False):
        if args.jsonl:
            print(json.dumps({"messages": messages}))
            continue
        for message in messages:
            print(f"{message['role']:>9}: {message['content']}")
        print()


if __name__ == "__main__":
    main()
