"""Server-sent events in a form that does not depend on where a stream was cut into chunks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]


def canonical_stream(body: bytes) -> dict[str, Any]:
    """The canonical form of a stream: of completion chunks, or of named events.

    Ids and times are left as they are, except that an id or time common to all chunks is named
    once. Framing is part of the form: what is not `data: …` and a blank line shows up.
    """
    *blocks, rest = body.decode("utf-8", "backslashreplace").split("\n\n")
    events = [_parse(block) for block in blocks]
    if any(set(event) != {"data"} for event in events):
        return {"after the last event": rest, "events": _merge_named(events)}
    return {"after the last event": rest, **_Chunks([event["data"] for event in events]).form()}


def _parse(block: str) -> Event:
    event: Event = {}
    for line in block.split("\n"):
        name, separator, value = line.partition(": ")
        if not separator or name in event:
            event.setdefault("odd lines", []).append(line)
            continue
        try:
            event[name] = json.loads(value)
        except ValueError:
            event[name] = value
    return event


def _merge_named(events: list[Event]) -> list[Event]:
    """Join consecutive events that are the same but for the text of their delta."""
    merged: list[Event] = []
    for event in events:
        data = event.get("data")
        if isinstance(data, dict):
            data.pop("sequence_number", None)  # it counts chunks
        if merged and _delta_text(event) is not None and _delta_text(merged[-1]) is not None:
            before, text = _delta_text(merged[-1]) or "", _delta_text(event) or ""
            if _with_delta(event, "") == _with_delta(merged[-1], ""):
                merged[-1] = _with_delta(event, before + text)
                continue
        merged.append(event)
    return merged


def _delta_text(event: Event) -> str | None:
    delta = event["data"].get("delta") if isinstance(event.get("data"), dict) else None
    text = delta.get("text") if isinstance(delta, dict) else delta
    return text if isinstance(text, str) else None


def _with_delta(event: Event, text: str) -> Event:
    data = event["data"]
    delta = data["delta"] | {"text": text} if isinstance(data["delta"], dict) else text
    return event | {"data": data | {"delta": delta}}


@dataclass
class _Choice:
    """What all chunks of one choice said together."""

    text: str = ""
    lists: dict[str, list[Any]] = field(default_factory=dict)
    """Token ids and the lists of log probabilities, joined over the chunks."""
    content_keys: list[str] = field(default_factory=list)
    finish: list[Any] = field(default_factory=list)

    def take(self, choice: dict[str, Any]) -> None:
        """Move out of the choice what a chunk boundary may cut."""
        holder, name = (choice["delta"], "content") if "delta" in choice else (choice, "text")
        self.text += holder.pop(name, None) or ""
        for key in ("token_ids", "prompt_token_ids"):
            self.lists.setdefault(key, []).extend(choice.pop(key, None) or [])
        for key, values in (choice.pop("logprobs", None) or {}).items():
            self.lists.setdefault(key, []).extend(values or [])


def _keys(chunk: dict[str, Any]) -> str:
    """Every key of a chunk, with its place: "id choices.delta.content …"."""
    names = []
    for key, value in chunk.items():
        choice = value[0] if key == "choices" and value else {}
        names += [f"choices.{name}" for name in choice] or [key]
        names += [f"choices.delta.{name}" for name in choice.get("delta", {})]
    return " ".join(sorted(names))


class _Chunks:
    """The chunks of a completion stream, put together again."""

    def __init__(self, events: list[Any]) -> None:
        self._choices: dict[int, _Choice] = {}
        self._envelopes: list[Any] = []
        self._usages: list[dict[str, Any]] = []
        self._order: list[Any] = []
        for event in events:
            self._take(event)

    def form(self) -> dict[str, Any]:
        """The canonical form; "order" holds whatever is not plain content, in its order."""
        choices = {index: vars(choice) for index, choice in sorted(self._choices.items())}
        counts = [usage["completion_tokens"] for usage in self._usages]
        return {
            "envelopes": self._envelopes,
            "order": self._order_of_marks(),
            "choices": choices,
            "usage of content": {
                "prompt_tokens": sorted({usage["prompt_tokens"] for usage in self._usages}),
                "totals right": all(
                    usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
                    for usage in self._usages
                ),
                "monotonic": len(self._choices) > 1 or counts == sorted(counts),
            },
        }

    def _order_of_marks(self) -> list[Any]:
        """Choices are decoded side by side: which of two neighbours ends first is chance."""
        marks: list[Any] = []
        for mark in self._order:
            last = marks[-1] if marks else None
            if isinstance(mark, list) and isinstance(last, list) and last[0] == mark[0] == "finish":
                marks[-1] = ["finish", *sorted([*last[1:], *mark[1:]])]
            else:
                marks.append(mark)
        return marks

    def _take(self, event: Any) -> None:
        if not isinstance(event, dict) or "choices" not in event:
            self._order.append(event)  # [DONE], or an error
            return
        keys = _keys(event)
        envelope = {key: event.pop(key, None) for key in ("id", "object", "created", "model")}
        if envelope not in self._envelopes:
            self._envelopes.append(envelope)
        if len(event["choices"]) != 1:
            self._order.append({"keys": keys, **event})  # usage
            return
        self._take_choice(event, keys)

    def _take_choice(self, event: Event, keys: str) -> None:
        choice = event["choices"][0]
        found = self._choices.setdefault(choice.get("index"), _Choice())
        if "role" in choice.get("delta", {}):
            self._order.append({"keys": keys, **event})
            return
        found.take(choice)
        if event.get("usage"):
            self._usages.append(event["usage"])
        if choice.get("finish_reason") is not None:
            self._order.append(["finish", choice.get("index")])
            found.finish.append({"keys": keys, **event})
            return
        if found.finish:
            self._order.append("content after its finish")
        if keys not in found.content_keys:
            found.content_keys = sorted([*found.content_keys, keys])
        event.pop("usage", None)
        if rest := _leftovers(event):
            self._order.append(rest)  # tool calls, reasoning, and anything unheard of


def _leftovers(event: Event) -> Any:
    """What a content chunk holds beside its content, or nothing."""
    choice = event.pop("choices")[0]
    delta = {key: value for key, value in choice.pop("delta", {}).items() if value}
    silent = {"index", "finish_reason", "stop_reason"}
    choice = {key: value for key, value in choice.items() if key not in silent and value}
    rest = {key: value for key, value in event.items() if value is not None}
    return [delta, choice, rest] if delta or choice or rest else None
