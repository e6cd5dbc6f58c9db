"""What the simulated users ask: prompts of an exact length in tokens, of the model's own words.

Every workload goes to `/v1/chat/completions` as text, because that is what the world uses: the chat
template and the tokenizer are part of what a frontend costs. Token-id prompts to `/v1/completions`
would be exact for free and leave that work out.

A prompt is a run of words that are one token each wherever they stand in a text, so its length is a
count of words. What the chat template adds is asked of the server once (`usage.prompt_tokens`) and
taken off, and every answer's usage is checked against the length that was meant. The first
`_UNIQUE` words are drawn for every prompt, so no two prompts share a block of the prefix cache; the
rest is a cut from one long ribbon, because drawing 8,000 words for every request would cost the
load generator a millisecond of the CPU that it shares with the server.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalellm_plugins.errors import ConfigError, closest_first

_UNIQUE = 12  # words drawn for each prompt; of 64 words or more there are 64**12 openings
_RIBBON = 32_768  # words
_WORDS_WANTED = 4096
_WORDS_NEEDED = 64


@dataclass(frozen=True)
class Workload:
    """One kind of use. All lengths are in tokens, the chat template's own included in `prompt`.

    `system` tokens of every prompt are a system message that all conversations share. With `turns`
    above 1 every stream leads conversations: each turn sends the whole history, with the server's
    real answers in it, and `prompt` more tokens.
    """

    name: str
    summary: str
    prompt: int
    output: int
    turns: int = 1
    system: int = 0

    @property
    def tokens_needed(self) -> int:
        """Length of the longest sequence, with some slack for answers that tokenize longer."""
        return self.system + int(self.turns * (self.prompt + self.output) * 1.1) + 64


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("short", "128 tokens in, 128 out", prompt=128, output=128),
        Workload("long", "8,192 tokens in, 128 out", prompt=8192, output=128),
        Workload(
            "chat",
            "conversations: 4 turns of 64 tokens in, 128 out, under 128 tokens of system prompt",
            prompt=64,
            output=128,
            turns=4,
            system=128,
        ),
    )
}


def workload_named(name: str) -> Workload:
    """Look a workload up.

    Raises:
        ConfigError: there is none of that name.
    """
    try:
        return WORKLOADS[name]
    except KeyError:
        valid = ", ".join(closest_first(name, WORKLOADS))
        raise ConfigError(f"--workloads: {name!r} is unknown. Valid: {valid}") from None


@dataclass(frozen=True)
class Template:
    """Tokens that the chat template adds: to a prompt's first message, and to a system message."""

    base: int
    system: int = 0


def words_of(model_dir: Path) -> list[str]:
    """Return words that the tokenizer in `model_dir` maps to one token each after a space.

    The order depends only on the tokenizer. At least `_WORDS_NEEDED`, at most `_WORDS_WANTED`.

    Raises:
        ConfigError: no tokenizer.json there, or one with too few such words.
    """
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"--tokenizer: {str(model_dir)!r} holds no tokenizer.json, from which the prompts are "
            "made. Give the folder of a model with a fast tokenizer."
        )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    ids = range(tokenizer.get_vocab_size())
    texts = {tokenizer.decode([number]).strip() for number in ids}
    candidates = sorted(text for text in texts if text.isascii() and text.isalpha())
    # Tried after another word, because some tokenizers cut the first word of a text differently.
    start = len(tokenizer.encode("a", add_special_tokens=False).ids)
    encoded = tokenizer.encode_batch([f"a {word}" for word in candidates], add_special_tokens=False)
    words = [
        word
        for word, encoding in zip(candidates, encoded, strict=True)
        if len(encoding.ids) == start + 1
    ]
    if len(words) < _WORDS_NEEDED:
        raise ConfigError(
            f"--tokenizer: {str(model_dir)!r} has {len(words)} words that are one token each; "
            f"{_WORDS_NEEDED} are needed to make prompts that differ. Give another tokenizer."
        )
    # Long words first: they are real words, where one- and two-letter tokens run into each other.
    words.sort(key=lambda word: (-min(len(word), 4), word))
    return words[:_WORDS_WANTED]


class Texts:
    """An endless supply of texts of a given number of words, different for every `seed`."""

    def __init__(self, words: Sequence[str], seed: int) -> None:
        self._words = words
        self._random = random.Random(seed)
        self._ribbon = self._random.choices(words, k=_RIBBON)

    def fixed(self, count: int) -> str:
        """Return the same text of `count` words whatever the seed."""
        return " ".join(["a", *(self._words[i % len(self._words)] for i in range(count - 1))])

    def text(self, count: int) -> str:
        """Return `count` words; the first of them are drawn for this text alone.

        Raises:
            ValueError: more words than the ribbon holds.
        """
        if count > _RIBBON:
            raise ValueError(f"a text of {count} words; the longest is {_RIBBON}")
        # The first word has no space before it and so may be another number of tokens: it is
        # always the same one, and thereby part of what the template adds.
        opening = ["a", *self._random.choices(self._words, k=_UNIQUE)][:count]
        rest = count - len(opening)
        start = self._random.randrange(_RIBBON - rest + 1)
        return " ".join(opening + self._ribbon[start : start + rest])


@dataclass(frozen=True)
class Body:
    """The parts of a request's JSON body that stay the same in a run."""

    model: str
    stream: bool

    def encode(self, messages: bytes, max_tokens: int) -> bytes:
        """Return the body for `messages` (JSON objects, joined by commas, without brackets)."""
        rest: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": self.stream,
        }
        if self.stream:
            rest["stream_options"] = {"include_usage": True}
        return b'{"messages":[%b],%b' % (messages, json.dumps(rest).encode()[1:])


def message(role: str, text: str) -> bytes:
    """Return a chat message as JSON."""
    return json.dumps({"role": role, "content": text}).encode()


class Prompts:
    """What one stream sends, request after request.

    Streams that start together and ask for the same would stay in step for ever: every wave's
    prompts would arrive at once and TTFT would measure the wave. So stream `index` of `streams`
    asks in its first request for only its share of the output tokens, and its first conversation
    is shorter, which spreads the streams evenly over the cycle. The load generator measures after
    these first requests.
    """

    def __init__(
        self,
        workload: Workload,
        texts: Texts,
        template: Template,
        body: Body,
        index: int,
        streams: int,
    ) -> None:
        self._workload = workload
        self._texts = texts
        self._template = template
        self._body = body
        self._turns = self._requests(index, streams)
        self._system = self._system_message()
        self._reply = b""
        self.expected_prompt: int | None = None
        self.expected_output = 0

    def next(self, reply: bytes) -> bytes:
        """Return the next request's body; `reply` is the text of the last answer, as JSON has it.

        Afterwards `expected_output` says how many tokens the answer must have, and
        `expected_prompt` how many the prompt (None where answers are part of it: a text need not
        map back to the tokens that made it).
        """
        self._reply = reply
        return next(self._turns)

    def _requests(self, index: int, streams: int) -> Iterator[bytes]:
        workload = self._workload
        first = max(2, workload.output * (index + 1) // streams)
        turns = 1 + index % workload.turns
        while True:
            yield from self._conversation(turns, first)
            turns, first = workload.turns, workload.output

    def _conversation(self, turns: int, output: int) -> Iterator[bytes]:
        workload = self._workload
        history = self._system
        added = self._template.base
        for turn in range(turns):
            history += message("user", self._texts.text(max(1, workload.prompt - added)))
            self.expected_prompt = workload.prompt + workload.system if turn == 0 else None
            self.expected_output = output
            yield self._body.encode(history, output)
            answer = b'{"role":"assistant","content":"%b"}' % self._reply
            history += b"," + answer + b","
            output = workload.output

    def _system_message(self) -> bytes:
        # The same for all conversations of all runs, as a service's is: the prefix cache has it.
        if not self._workload.system:
            return b""
        words = max(1, self._workload.system - self._template.system)
        return message("system", self._texts.fixed(words)) + b","
