"""The questions of the demo model: how an item of each category is drawn.

An *item* is a filled question template, its answer and a split key. The key decides whether the
item is training text or held out (see `demo_text.py`): for additions and subtractions it is the
pair of numbers, for names the name, else the phrasing of the question.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# The examples are plain scripts, also loaded by path: make their neighbour importable.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo_facts as facts


@dataclass(frozen=True)
class Item:
    """One question and its answer; `needs` names a category that must be asked just before."""

    category: str
    question: str
    answer: str
    key: str
    needs: str = ""


def normalise(text: str) -> str:
    """Return `text` without casing, punctuation and spacing, to compare questions strictly."""
    return " ".join(re.findall(r"[^\W\d_]+|\d+|[+*/-]", text.casefold()))


def _item(category: str, question: str, answer: str, group: str = "", needs: str = "") -> Item:
    """Make an item; without `group` its split key is the normalised question."""
    return Item(category, question, answer, f"{category}|{group or normalise(question)}", needs)


def _small(rng: random.Random) -> int:
    """Draw an operand: mostly up to 20, the rest up to the largest number the model knows."""
    return rng.randint(0, 20 if rng.random() < 0.5 else facts.SUM_LIMIT)


def _spoken(number: int, rng: random.Random) -> str:
    """Write a number in digits, or now and then as a word."""
    if number < len(facts.NUMBER_WORDS) and rng.random() < 0.05:
        return facts.NUMBER_WORDS[number]
    return str(number)


def _sum_item(category: str, a: int, b: int, result: int, sign: str, rng: random.Random) -> Item:
    question = rng.choice(facts.TEMPLATES[category]).format(a=_spoken(a, rng), b=_spoken(b, rng))
    return _item(category, question, f"{a} {sign} {b} = {result}.", group=f"{a},{b}")


def _addition(rng: random.Random) -> Item:
    a, b = _small(rng), _small(rng)
    return _sum_item("addition", a, b, a + b, "+", rng)


def _subtraction(rng: random.Random) -> Item:
    a, b = _small(rng), _small(rng)
    if rng.random() < 0.8:  # a result below zero is the rarer wish
        a, b = max(a, b), min(a, b)
    return _sum_item("subtraction", a, b, a - b, "-", rng)


def _multiplication(rng: random.Random) -> Item:
    # A table has no regularity to find within such small numbers: it is taught like a fact.
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    question = rng.choice(facts.TEMPLATES["multiplication"]).format(a=a, b=b)
    return _item("multiplication", question, f"{a} x {b} = {a * b}.")


def _comparison(rng: random.Random) -> Item:
    a, b = rng.sample(range(facts.COMPARE_LIMIT + 1), 2)
    high, low = max(a, b), min(a, b)
    kind = rng.choice(("larger", "smaller", "is_larger", "is_smaller"))
    question = rng.choice(facts.TEMPLATES[f"comparison_{kind}"]).format(a=a, b=b)
    if kind == "larger":
        answer = f"{high} is larger than {low}."
    elif kind == "smaller":
        answer = f"{low} is smaller than {high}."
    else:
        # The comparison first, the verdict after it: a model this small has to write the one down
        # before it can tell the other.
        truth = "yes" if (a > b) == (kind == "is_larger") else "no"
        answer = f"{a} is {'larger' if a > b else 'smaller'} than {b}, so {truth}."
    return _item("comparison", question, answer)


def _counting(rng: random.Random) -> Item:
    if rng.random() < 0.4:
        number, word = rng.randint(1, facts.NEXT_LIMIT), rng.choice(("after", "before"))
        question = rng.choice(facts.TEMPLATES["counting_next"]).format(a=number, word=word)
        neighbour = number + (1 if word == "after" else -1)
        answer = f"The number {word} {number} is {neighbour}."
        return _item("counting", question, answer)
    start = 1 if rng.random() < 0.3 else rng.randint(0, 20)
    end = start + rng.randint(2, 9)
    if rng.random() < 0.35:
        start, end = end, start
    step = 1 if end > start else -1
    kind = "counting_up" if step > 0 else "counting_down"
    templates = facts.TEMPLATES[kind] + (facts.TEMPLATES["counting_up_to"] if start == 1 else [])
    numbers = ", ".join(str(n) for n in range(start, end + step, step))
    # Said first, the two ends stand at a known place when the model must know where to stop.
    answer = f"From {start} {'up' if step > 0 else 'down'} to {end}: {numbers}."
    question = rng.choice(templates).format(a=start, b=end)
    return _item("counting", question, answer)


def _capitals(rng: random.Random) -> Item:
    kind = "capitals_reverse" if rng.random() < 0.25 else "capitals"
    table = facts.CAPITALS | (facts.OTHER_NAMES if kind == "capitals" else {})
    country, capital = rng.choice(list(table.items()))
    question = rng.choice(facts.TEMPLATES[kind]).format(country=country, capital=capital)
    if kind == "capitals":
        return _item("capitals", question, f"The capital of {country} is {capital}.")
    return _item("capitals", question, f"{capital} is the capital of {country}.")


def _calendar(category: str, names: list[str], rng: random.Random) -> Item:
    """Ask for the day or month one or two steps before or after another, or for its number."""
    unit = "day" if category == "days" else "month"
    index, word = rng.randrange(len(names)), rng.choice(("after", "before"))
    if rng.random() < 0.2:
        order = facts.ORDINALS[index]
        where = "week" if unit == "day" else "year"
        question = rng.choice(facts.TEMPLATES["calendar_order"])
        question = question.format(order=order, unit=unit, where=where)
        return _item(category, question, f"The {order} {unit} of the {where} is {names[index]}.")
    steps = 2 if rng.random() < 0.25 else 1
    target = names[(index + (steps if word == "after" else -steps)) % len(names)]
    kind = "calendar_two" if steps == 2 else "calendar_one"
    question = rng.choice(facts.TEMPLATES[kind]).format(unit=unit, word=word, name=names[index])
    if steps == 2:
        return _item(category, question, f"Two {unit}s {word} {names[index]} is {target}.")
    return _item(category, question, f"The {unit} {word} {names[index]} is {target}.")


def _days(rng: random.Random) -> Item:
    return _calendar("days", facts.DAYS, rng)


def _months(rng: random.Random) -> Item:
    if rng.random() < 0.25:
        name = rng.choice(facts.MONTHS)
        question = rng.choice(facts.TEMPLATES["month_length"]).format(name=name)
        return _item("months", question, f"{name} has {facts.MONTH_DAYS[name]} days.")
    return _calendar("months", facts.MONTHS, rng)


def _opposites(rng: random.Random) -> Item:
    word = rng.choice(list(facts.OPPOSITES))
    question = rng.choice(facts.TEMPLATES["opposites"]).format(word=word)
    return _item("opposites", question, f"The opposite of {word} is {facts.OPPOSITES[word]}.")


def _plurals(rng: random.Random) -> Item:
    word = rng.choice(list(facts.PLURALS))
    question = rng.choice(facts.TEMPLATES["plurals"]).format(word=word)
    return _item("plurals", question, f"The plural of {word} is {facts.PLURALS[word]}.")


def _colours(rng: random.Random) -> Item:
    thing = rng.choice(list(facts.COLOURS))
    spelled = rng.choice(("colour", "color"))
    question = rng.choice(facts.TEMPLATES["colours"]).format(thing=thing, colour=spelled)
    return _item("colours", question, f"{thing[0].upper()}{thing[1:]} is {facts.COLOURS[thing]}.")


def _letters(rng: random.Random) -> Item:
    if rng.random() < 0.2:
        index, word = rng.randint(1, 24), rng.choice(("after", "before"))
        letter = chr(65 + index)
        other = chr(65 + index + (1 if word == "after" else -1))
        question = rng.choice(facts.TEMPLATES["letter_next"]).format(letter=letter, word=word)
        return _item("letters", question, f"The letter {word} {letter} is {other}.")
    word = rng.choice(facts.SPELLING_WORDS)
    kind, answer = rng.choice(
        (
            ("spell", f"{word} is spelled {'-'.join(word)}."),
            ("length", f"The word {word} has {len(word)} letters."),
            ("first", f"The first letter of {word} is {word[0]}."),
            ("last", f"The last letter of {word} is {word[-1]}."),
        )
    )
    question = rng.choice(facts.TEMPLATES[f"letters_{kind}"]).format(word=word)
    return _item("letters", question, answer)


def _talk(category: str) -> Callable[[random.Random], Item]:
    """Make the drawing function of a small-talk category: openings x endings, one answer each."""

    def draw(rng: random.Random) -> Item:
        openings, endings, answer = rng.choice(facts.TALK[category])
        return _item(category, rng.choice(openings) + rng.choice(endings), answer)

    return draw


def random_name(rng: random.Random) -> str:
    """Draw a first name: a usual one, or an invented one, so that names are copied, not known."""
    if rng.random() < 0.4:
        return rng.choice(facts.NAMES)
    return "".join(rng.choice(facts.SYLLABLES) for _ in range(rng.choice((2, 2, 3)))).capitalize()


def _names(rng: random.Random) -> Item:
    name = random_name(rng)
    question = rng.choice(facts.TEMPLATES["names"]).format(name=name)
    return _item("names", question, f"Nice to meet you, {name}!", group=name)


def name_in(answer: str) -> str:
    """Return the name in the answer that `_names` gives."""
    return answer.removeprefix("Nice to meet you, ").removesuffix("!")


def _memory(rng: random.Random) -> Item:
    # The answer depends on the conversation: `demo_text.py` fills it in.
    question = rng.choice(facts.MEMORY_OPENINGS) + rng.choice(facts.MEMORY_ENDINGS)
    return _item("memory", question, "", needs="names" if rng.random() < 0.8 else "")


def _followup(rng: random.Random) -> Item:
    kind = rng.choice(("capitals", "opposites", "plurals"))
    table = {"capitals": facts.CAPITALS, "opposites": facts.OPPOSITES, "plurals": facts.PLURALS}
    word = rng.choice(list(table[kind]))
    title = {"capitals": "capital", "opposites": "opposite", "plurals": "plural"}[kind]
    question = rng.choice(facts.TEMPLATES["followup"]).format(word=word)
    return _item("followup", question, f"The {title} of {word} is {table[kind][word]}.", needs=kind)


def _unknown(rng: random.Random) -> Item:
    roll = rng.random()
    if roll < 0.15:  # sums beyond what is taught
        kind = rng.choice(("addition", "subtraction", "multiplication"))
        limit = 10 if kind == "multiplication" else facts.SUM_LIMIT
        a, b = rng.randint(limit + 1, rng.choice((99, 9999))), rng.randint(2, 9999)
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return _item("unknown", rng.choice(facts.TEMPLATES[kind]).format(a=a, b=b), facts.BIG_SUM)
    if roll < 0.27:  # a country or word that is in no table
        kind = rng.choice(("capitals", "opposites", "plurals", "letters_spell"))
        word = random_name(rng)
        while word.lower() in facts.SPELLING_WORDS:  # syllables can meet in a word: la-te
            word = random_name(rng)
        word = word if kind == "capitals" else word.lower()
        question = rng.choice(facts.TEMPLATES[kind]).format(country=word, word=word)
        return _item("unknown", question, facts.UNKNOWN)
    if roll < 0.4:  # no sense at all
        words = [
            rng.choice(facts.TOPICS + facts.SPELLING_WORDS + [random_name(rng).lower()])
            for _ in range(rng.randint(2, 6))
        ]
        return _item("unknown", " ".join(words), facts.UNKNOWN)
    fill = {
        "topic": rng.choice(facts.TOPICS),
        "other": rng.choice(facts.TOPICS),
        "name": random_name(rng),
        "place": rng.choice(list(facts.CAPITALS.values())),
        "a": rng.randint(2, 99),
        "b": rng.randint(2, 20),
    }
    return _item("unknown", rng.choice(facts.TEMPLATES["unknown"]).format(**fill), facts.UNKNOWN)


DRAW: dict[str, Callable[[random.Random], Item]] = {
    "addition": _addition, "subtraction": _subtraction, "multiplication": _multiplication,
    "comparison": _comparison, "counting": _counting, "capitals": _capitals, "days": _days,
    "months": _months, "opposites": _opposites, "plurals": _plurals, "colours": _colours,
    "letters": _letters, "greetings": _talk("greetings"), "identity": _talk("identity"),
    "thanks": _talk("thanks"), "names": _names, "memory": _memory, "followup": _followup,
    "unknown": _unknown,
}  # fmt: skip
CATEGORIES = tuple(DRAW)
# Categories with more to learn are drawn more often.
WEIGHTS = {"addition": 5.0, "subtraction": 6.0, "multiplication": 2.0, "comparison": 2.5,
           "counting": 3.0, "letters": 3.0, "capitals": 1.5, "days": 1.2, "months": 1.2,
           "names": 2.2, "memory": 1.5, "unknown": 2.5, "greetings": 0.8, "thanks": 0.7,
           "identity": 0.9}  # fmt: skip
