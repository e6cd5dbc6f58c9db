"""Stop strings of one request: when they match, and which text may be shown before they do.

The rule is vLLM's (`BaseIncrementalDetokenizer` in `vllm/v1/engine/detokenizer.py`): the stop
string that completes first wins, in the order of the list if several do; text that could still be
the beginning of one is held back, by length.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .detokenize import TokenStream


class StopText:
    """The text of a request with stop strings.

    `text` is all of it so far, for answers that are not streamed; it ends before the stop string
    that matched, or after it with `include_stop`. `num_tokens` counts the tokens that belong to the
    answer: those pushed, without the ones after the token that completed a stop string.
    """

    def __init__(self, stop: Sequence[str], *, include_stop: bool, min_tokens: int) -> None:
        """`stop` has at least one string and none is empty (SamplingParams checks that).

        A stop string that begins and ends within the first `min_tokens` tokens does not count.
        """
        self.text = ""
        self.num_tokens = 0
        self._stop = [(string, len(string)) for string in stop]
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._held_back = 0 if include_stop else max(map(len, stop)) - 1
        self._shown = 0

    def push(
        self, stream: TokenStream, token_ids: Sequence[int], *, stop_terminated: bool
    ) -> str | None:
        """Add one step's tokens; return the stop string that matched, None if none did.

        `stop_terminated`: the engine finished the request at the last of them, a stop token; its
        text is left out unless stop strings are included. After a match nothing is to be pushed:
        the request has finished, and `delta(finished=True)` is the rest of its text.
        """
        if len(token_ids) == 1 and not (stop_terminated and not self._include_stop):
            return self._push_one(stream.feed(token_ids[0]))
        if not token_ids:
            return None
        before = self.num_tokens
        ends = self._append(stream, token_ids, stop_terminated and not self._include_stop)
        if self.num_tokens <= self._min_tokens:
            return None
        # Text of the first min_tokens may begin a match, not end one.
        unchecked = ends[max(self._min_tokens - before, 0)]
        match = self._first_match(unchecked)
        if match is None:
            return None
        stop, start, end = match
        # Several tokens in one step: those after the one that completed the stop string go.
        self.num_tokens = before + bisect_left(ends, end, lo=1)
        self.text = self.text[: end if self._include_stop else start]
        return stop

    def _push_one(self, piece: str) -> str | None:
        """Do what `push` does for one token: nearly every step, so without lists of lengths."""
        text, self.text = self.text, ""  # as in _append
        unchecked = len(text)
        text += piece
        self.text = text
        self.num_tokens += 1
        if not piece or self.num_tokens <= self._min_tokens:
            return None
        match = self._first_match(unchecked)
        if match is None:
            return None
        stop, start, end = match
        self.text = text[: end if self._include_stop else start]
        return stop

    def _append(self, stream: TokenStream, token_ids: Sequence[int], skip_last: bool) -> list[int]:
        """Return the text's length before, and after each token that was decoded."""
        # The local name is the only reference to the text while it grows, so CPython extends it in
        # place; through the attribute each token would copy the whole answer.
        text, self.text = self.text, ""
        ends = [len(text)]
        for token_id in token_ids[:-1] if skip_last else token_ids:
            text += stream.feed(token_id)
            ends.append(len(text))
        self.text = text
        self.num_tokens += len(token_ids)
        return ends

    def _first_match(self, unchecked: int) -> tuple[str, int, int] | None:
        """Return (stop string, start, end) of the match that ends first behind `unchecked`."""
        if len(self.text) == unchecked:
            return None
        best: tuple[str, int, int] | None = None
        text = self.text
        for stop, length in self._stop:
            begin = unchecked + 1 - length
            start = text.find(stop, begin if begin > 0 else 0)
            if start >= 0 and (best is None or start + length < best[2]):
                best = stop, start, start + length
        return best

    def delta(self, *, finished: bool) -> str:
        """Return the text since the last call that no stop string can take back any more.

        `finished`: the request has ended, for whichever reason, and nothing is held back.
        """
        end = len(self.text) - (0 if finished else self._held_back)
        if end <= self._shown:
            return ""
        start, self._shown = self._shown, end
        return self.text[start:end]
