"""Token ids to text, one at a time: what vLLM's FastIncrementalDetokenizer yields, for less.

vLLM decodes with `tokenizers.decoders.DecodeStream`, which decodes the last tokens again for each
new one (`vllm/v1/engine/detokenizer.py`). The decoder of byte-level tokenizers (GPT-2, Llama 3,
Qwen …) only concatenates: a token's bytes do not depend on its neighbours. For those a table from
token id to bytes, and to the bytes as they stand inside a JSON string, answers with one list index.
Every other tokenizer, and every stream that a table cannot serve, goes to DecodeStream itself.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers
import tokenizers.decoders

from scalellm_plugins.errors import ConfigError

from .token_table import TokenTable, View, added_tokens, ends_unfinished, escape, report_invalid

__all__ = ["Detokenizer", "TokenStream", "escape"]

_INVALID_PREFIX = "Invalid prefix encountered"  # how tokenizers' error of that name begins

_SPARE_IDS = 65_536  # a table may have this many holes, and as many as it has tokens

_CHECK_S = 0.05
_CHECK_STREAMS = 64
_CHECK_TOKENS = 48
_CHECK_CHUNK = 4096


class TokenStream:
    """The text of one request, token by token. Made by `Detokenizer.stream`."""

    __slots__ = ()

    def feed(self, token_id: int) -> str:
        """Return the text that `token_id` completes, "" while a character is unfinished.

        The concatenation over a request's tokens is vLLM's output text; what is held back at the
        end (an unfinished character) is never shown, there as here. An id that the tokenizer does
        not have yields "".

        vLLM leaves out the text of the last token where the engine reported a stop token and the
        request has no `include_stop_str_in_output`: do not feed that token. (`StopText` does this
        by itself.)
        """
        raise NotImplementedError

    def feed_json(self, token_id: int) -> bytes:
        """Return `escape(self.feed(token_id))`; either is called for a token, never both."""
        return escape(self.feed(token_id))

    @property
    def table(self) -> list[bytes | None] | None:
        """Where `feed_json` would look the next token up, None where it would not.

        An id that is not in it, or has None there, must be fed; all others need not.
        """
        return None


class Detokenizer:
    """What the streams of one tokenizer share: one per process, built when the model loads.

    `kind` is "table" or "stream" (DecodeStream) and `why` the reason in one line. A table takes
    about 75 bytes per entry of the vocabulary, 11 MB for 150,000.
    """

    def __init__(self, backend: Any, table: TokenTable | None, why: str) -> None:
        self.kind = "stream" if table is None else "table"
        self.why = why
        self._backend = backend
        self._table = table
        self._added = {id_: token.content for id_, token in added_tokens(backend).items()}

    @classmethod
    def build(cls, tokenizer: Any) -> Detokenizer:
        """Take transformers' fast tokenizer (or `tokenizers.Tokenizer`) and check what it does.

        The table is compared with the tokenizer's own decoding: every entry once, then random
        streams for at most 50 ms. If they disagree, DecodeStream is used and `why` says so.

        Raises ConfigError for a tokenizer that is not of the tokenizers library (vLLM decodes
        those with a slower algorithm, which has other rules).
        """
        backend = _backend_of(tokenizer)
        why = _why_no_table(backend)
        if why:
            return cls(backend, None, why)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        if size > 2 * len(vocabulary) + _SPARE_IDS:
            return cls(backend, None, f"ids up to {size - 1:,} for {len(vocabulary):,} tokens")
        table = TokenTable(backend, size)
        difference = _difference(table, backend)
        if difference:
            return cls(backend, None, f"the byte table differs from the tokenizer: {difference}")
        return cls(backend, table, f"byte-level tokenizer, {table.size:,} tokens")

    def stream(
        self,
        prompt_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> TokenStream:
        """Return the stream of a request whose prompt was `prompt_ids`.

        Both options mean what they mean in vLLM's SamplingParams (the second has an effect only
        without the first). Raises OverflowError for a prompt id that is not a 32-bit number where
        DecodeStream is needed, as vLLM does.
        """
        stream: TokenStream
        view = self._view(prompt_ids, skip_special_tokens)
        if view is None:
            stream = _LibraryStream(self._backend, prompt_ids, skip_special_tokens)
        else:
            stream = _TableStream(view)
        if self._added and not (skip_special_tokens or spaces_between_special_tokens):
            return _UnspacedStream(stream, self._added)
        return stream

    def text(
        self,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Return the whole output at once: the concatenation of `feed` over `output_ids`."""
        spaces = skip_special_tokens or spaces_between_special_tokens or not self._added
        view = self._view(prompt_ids, skip_special_tokens) if spaces else None
        if view is not None:
            return view.text(output_ids)
        feed = self.stream(
            prompt_ids,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        ).feed
        return "".join(map(feed, output_ids))

    def _view(self, prompt_ids: Sequence[int], skip_special_tokens: bool) -> View | None:
        """The table's view for a request, None if it needs DecodeStream.

        After a prompt that ends within a character DecodeStream's first step yields the prompt's
        text as well. Rare, hard to imitate, and so left to DecodeStream.
        """
        if self._table is None:
            return None
        view = self._table.view(skip_special_tokens)
        return None if view.ends_unfinished(prompt_ids) else view


class _TableStream(TokenStream):
    """A request whose tokens are in the table. `_pending`: bytes of an unfinished character."""

    __slots__ = ("_pending", "_raw", "_ready", "_size", "_view")

    def __init__(self, view: View) -> None:
        self._view = view
        # Attributes of their own: one lookup less for each token.
        self._raw, self._ready = view
        self._size = len(view.raw)
        self._pending = b""

    def feed(self, token_id: int) -> str:
        if not 0 <= token_id < self._size:
            self._view.bytes_of(token_id)  # reports it
            return ""
        raw = self._raw[token_id]
        if self._pending:
            return self._go_on(raw)
        if self._ready[token_id] is None:
            self._pending = raw
            return ""
        return raw.decode("utf-8", "replace")

    def feed_json(self, token_id: int) -> bytes:
        if not self._pending and 0 <= token_id < self._size:
            ready = self._ready[token_id]
            if ready is not None:
                return ready
            self._pending = self._raw[token_id]
            return b""
        text = self.feed(token_id)
        return escape(text) if text else b""

    @property
    def table(self) -> list[bytes | None] | None:
        return None if self._pending else self._ready

    def _go_on(self, raw: bytes) -> str:
        """Add to the pending bytes; return their text if it no longer ends unfinished.

        Like DecodeStream this waits where the model really produced U+FFFD, or bytes that can
        never become a character: the text comes with the next token that ends well.
        """
        self._pending += raw
        if ends_unfinished(self._pending):
            return ""
        text = self._pending.decode("utf-8", "replace")
        self._pending = b""
        return text


class _LibraryStream(TokenStream):
    """A request decoded by DecodeStream, with the two errors that vLLM recovers from."""

    __slots__ = ("_backend", "_skip_special_tokens", "_stream")

    def __init__(self, backend: Any, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        # Looked up on the module for each stream, as vLLM does: replacements of DecodeStream
        # (fastokens) put themselves there.
        self._stream = tokenizers.decoders.DecodeStream(
            ids=list(prompt_ids), skip_special_tokens=skip_special_tokens
        )

    def feed(self, token_id: int) -> str:
        try:
            text = self._stream.step(self._backend, token_id)
        except (OverflowError, TypeError):
            report_invalid(token_id)
            text = None
        except Exception as error:
            # A bare Exception is what the library raises; only its text tells the cases apart.
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            self._stream = tokenizers.decoders.DecodeStream(
                skip_special_tokens=self._skip_special_tokens
            )
            text = self._stream.step(self._backend, token_id)
        return text or ""


class _UnspacedStream(TokenStream):
    """`spaces_between_special_tokens=False`: an added token after an added token is verbatim."""

    __slots__ = ("_added", "_after_added", "_stream")

    def __init__(self, stream: TokenStream, added: dict[int, str]) -> None:
        self._stream = stream
        self._added = added
        self._after_added = False

    def feed(self, token_id: int) -> str:
        text = self._stream.feed(token_id)
        content = self._added.get(token_id)
        if content is None:
            self._after_added = False
            return text
        if self._after_added:
            return content
        self._after_added = True
        return text


def _backend_of(tokenizer: Any) -> Any:
    # By name: the import of transformers takes seconds, and who has such a tokenizer has paid it.
    if any(base.__name__ == "TokenizersBackend" for base in type(tokenizer).__mro__):
        return tokenizer._tokenizer
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return tokenizer
    raise ConfigError(
        f"tokenizer {type(tokenizer).__name__}: the fast lane needs one of the tokenizers library "
        "(tokenizer.json). Serve with --tokenizer-mode auto, or with the fast lane off"
    )


def _why_no_table(backend: Any) -> str | None:
    """Return why this tokenizer's decoder cannot be a table; None for ByteLevel alone."""
    decoder = backend.decoder
    if decoder is None:
        return "a tokenizer without decoder"
    try:
        state = json.loads(decoder.__getstate__())
    except Exception:
        # A decoder written in Python cannot be serialized, and does who knows what.
        return "a decoder of its own"
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    return None if kinds == ["ByteLevel"] else f"decoder {'+'.join(kinds)}, not ByteLevel alone"


def _difference(table: TokenTable, backend: Any, seed: int = 0) -> str | None:
    """Return where the table and the tokenizer disagree, None if nowhere.

    The seed is fixed, so that a tokenizer has a table at every start or at none.
    """
    for skip in (False, True):
        view = table.view(skip)
        for start in range(0, table.size, _CHECK_CHUNK):
            chunk = range(start, min(start + _CHECK_CHUNK, table.size))
            text = b"".join(view.raw[start : chunk.stop]).decode("utf-8", "replace")
            if text != backend.decode(list(chunk), skip_special_tokens=skip):
                return f"within tokens {start} to {chunk.stop - 1}"
    end = time.monotonic() + _CHECK_S
    for skip, prompt, ids in _random_streams(table, backend, random.Random(seed)):
        view = table.view(skip)
        if time.monotonic() > end:
            break
        if view.ends_unfinished(prompt):
            continue
        ours, theirs = _TableStream(view), _LibraryStream(backend, prompt, skip)
        for step, token_id in enumerate(ids):
            if ours.feed(token_id) != theirs.feed(token_id):
                return f"token {token_id} after {ids[:step]} and the prompt {prompt}"
    return None


def _random_streams(
    table: TokenTable, backend: Any, rng: random.Random
) -> Iterator[tuple[bool, list[int], list[int]]]:
    """Yield (skip special tokens, prompt, output) with many tokens of the difficult kinds."""
    torn = [token_id for token_id, ready in enumerate(table.view(False).ready) if ready is None]
    kinds: list[Sequence[int]] = [
        range(table.size),
        torn,
        list(added_tokens(backend)),
        [table.size],
    ]
    pools = [kind for kind in kinds if kind]
    for _ in range(_CHECK_STREAMS):
        ids = [rng.choice(rng.choice(pools)) for _ in range(_CHECK_TOKENS)]
        prompt = rng.randrange(_CHECK_TOKENS // 4)
        yield rng.random() < 0.5, ids[:prompt], ids[prompt:]
