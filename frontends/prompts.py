"""Prompts of the fast lane: a chat rendered and tokenized in tens of microseconds.

vLLM renders in one thread hop (transformers' `apply_chat_template`) and tokenizes in another
(transformers' `__call__` around the Rust tokenizer). Here the compiled template and the Rust
tokenizer are called directly, and `segments.SegmentCache` tokenizes only what is new. Equality with
vLLM is not assumed: `ChatPrompts.build` takes both ways and compares, and whatever differs is left
to vLLM's own code.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from .chat_probes import overridden, prepare_chat
from .cuts import FRAGMENTS, AddedToken, choose_cuts, sample_texts
from .rendering import Chat, Message, render
from .segments import Ids, Plan, SegmentCache
from .words import Words, boundary_splits

# The self-check of the segment cache, of a start that takes 20-40 s anyway.
CHECK_SECONDS = 0.15
CHECK_TEXTS = 2000
BRACKET_TEXTS = 100
# Where transformers' wrapper turns text into ids; a model's own class may do something else there.
_METHODS = ("__call__", "_encode_plus")


class ChatPrompts:
    """Renders and tokenizes for one model in one worker process.

    `render`, `plan_chat`, `plan_completion` and `Plan.commit` belong to the event loop's thread;
    `Plan.encode` may run in another and releases the GIL while it tokenizes. Texts must be valid
    Unicode, as msgspec decodes them: a lone surrogate is a TypeError in `Plan.encode`.

    Left to the caller: a prompt of more ids than `max_model_len`, and every request with an option
    that changes rendering or tokenization (`chat_template`, `chat_template_kwargs`, `documents`,
    `reasoning_effort`, `tools`, `add_special_tokens`, `truncate_prompt_tokens` …) go to vLLM, which
    has the error messages. vLLM also refuses a text of more than `max_model_len` times
    `tokenizer.max_chars_per_token` characters before it tokenizes: check that first, or pay for it.

    Attributes:
        cache: the segments; `cache.stats`, and `cache.off` if this tokenizer cannot be split.
        chat_off: why no chat can be rendered here (`render` always returns None); or None.
    """

    def __init__(
        self, chat: Chat | str, cache: SegmentCache, bracket: tuple[Ids, Ids] | SegmentCache
    ) -> None:
        """Use `build`. bracket: what surrounds every completion, or how to tokenize it whole."""
        self.cache = cache
        self.chat_off = chat if isinstance(chat, str) else None
        self._chat = None if isinstance(chat, str) else chat
        self._bracket = bracket

    @classmethod
    def build(
        cls,
        *,
        tokenizer: Any,
        model_config: Any,
        chat_template: str | None,
        content_format: str,
        default_template_kwargs: dict[str, Any] | None,
        cache_bytes: int,
        seed: int = 0,
    ) -> ChatPrompts | str:
        """Prepare for one model.

        Args:
            tokenizer: vLLM's (`renderer.tokenizer`); read here, neither kept nor changed.
            model_config: vLLM's `ModelConfig`.
            chat_template: the text that `--chat-template` names, None for the model's own.
            content_format: `--chat-template-content-format`.
            default_template_kwargs: `--default-chat-template-kwargs`.
            cache_bytes: bound of the segment cache; 0 keeps nothing.
            seed: of the random texts of the self-check.

        Returns:
            The prompts, or one line that says why neither chats nor completions can be tokenized
            here. If only chats cannot, `chat_off` says why.
        """
        reason = _unsupported(tokenizer, model_config)
        if reason is not None:
            return reason
        try:
            rust = _copied(tokenizer)
        except Exception as error:  # parts written in Python cannot be copied
            return f"the tokenizer cannot be copied: {error}"
        chat, renderings = prepare_chat(
            tokenizer, model_config, chat_template, content_format, default_template_kwargs or {}
        )
        return _checked(chat, renderings, tokenizer, rust, cache_bytes, random.Random(seed))

    def render(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str | None:
        """Render `messages`, decoded from JSON and not validated, as vLLM would.

        Returns None for a shape that is not handled here and for whatever the template refuses:
        vLLM renders it again and has the right error. The messages are left as they are.
        """
        if self._chat is None:
            return None
        return render(self._chat, messages, add_generation_prompt, continue_final_message)

    def plan_chat(self, text: str) -> Plan:
        """Plan the tokenization of a rendered chat: no BOS but the one that the template wrote."""
        return self.cache.plan(text)

    def plan_completion(self, text: str) -> Plan:
        """Plan the tokenization of a text prompt, with the tokenizer's own BOS and EOS."""
        if isinstance(self._bracket, SegmentCache):
            return self._bracket.plan(text)
        return self.cache.plan(text, *self._bracket)


def _checked(
    chat: Chat | str,
    renderings: Sequence[str],
    tokenizer: Any,
    rust: Any,
    cache_bytes: int,
    rng: random.Random,
) -> ChatPrompts | str:
    """Make the cache and compare it, or what is left without it, with transformers' wrapper."""

    def reference(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def bracketed(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=True)["input_ids"]
        return ids

    encode = _encoder(rust, False)
    added = rust.get_added_tokens_decoder().items()
    raw = [
        AddedToken(token.content, number, token.lstrip, token.rstrip, token.single_word)
        for number, token in added
        if token.content and not token.normalized
    ]
    cuts = choose_cuts(raw, lambda token: any(token in text for text in renderings))
    words = Words(encode, rust)
    fragments = [*FRAGMENTS, *(token.content for _, token in added)]
    by_word = boundary_splits(rust) and words.check(rng, fragments) is None
    cache = SegmentCache(
        words if by_word else encode,
        cuts.specials,
        cache_bytes,
        lstrip=cuts.lstrip,
        rstrip=cuts.rstrip,
        opaque=cuts.opaque,
        off=_indivisible(rust),
    )
    others = [token.content for _, token in added]
    texts = [*renderings, *sample_texts(rng, [*cuts.specials], others, CHECK_TEXTS)]
    if (wrong := cache.check(reference, texts, CHECK_SECONDS)) is not None:
        cache.turn_off(f"splitting changes the tokens of {wrong[:80]!r}")
        if (wrong := cache.check(reference, texts, CHECK_SECONDS)) is not None:
            return f"transformers' wrapper gives other tokens for {wrong[:80]!r}"
    samples = sample_texts(rng, [*cuts.specials], others, BRACKET_TEXTS)
    bracket = _bracket(encode, bracketed, samples)
    if bracket is None:
        return ChatPrompts(chat, cache, SegmentCache(_encoder(rust, True), {}, 0))
    return ChatPrompts(chat, cache, bracket)


def _encoder(rust: Any, special: bool) -> Callable[[str], list[int]]:
    """Return text to ids, with or without what the post-processor adds."""

    def encode(text: str) -> list[int]:
        # Not `encode`: that holds the GIL, and computes offsets that nobody reads (456 kB: 553 ms
        # against 189 ms; 20 characters: 12.5 µs against 11.6 µs).
        ids: list[int] = rust.encode_batch_fast([text], add_special_tokens=special)[0].ids
        return ids

    return encode


def _unsupported(tokenizer: Any, model_config: Any) -> str | None:
    """Why this tokenizer cannot be called around transformers' wrapper; None if it can."""
    from transformers import TokenizersBackend
    from vllm.tokenizers.registry import tokenizer_args_from_config

    if tokenizer is None:
        return "the server has no tokenizer (--skip-tokenizer-init)"
    mode = tokenizer_args_from_config(model_config)[0]
    if mode != "hf":
        return f"tokenizer mode {mode!r} has a renderer of its own"
    if not isinstance(tokenizer, TokenizersBackend):
        return f"{type(tokenizer).__name__} is not a Rust tokenizer"
    if model_config.is_encoder_decoder:
        return "an encoder-decoder model has two prompts"
    return overridden(tokenizer, _METHODS)


def _copied(tokenizer: Any) -> Any:
    """Copy the Rust tokenizer: transformers switches truncation on and off in the shared one."""
    shared = tokenizer.backend_tokenizer
    own = type(shared).from_str(shared.to_str())
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return own


def _indivisible(rust: Any) -> str | None:
    """Why the text cannot be split at special tokens at all; None if it may be."""
    if rust.encode_special_tokens:
        return "special tokens in the text are ordinary text for this tokenizer"
    if getattr(rust.model, "dropout", None):
        return "BPE dropout makes tokens random"
    return None


def _bracket(
    encode: Callable[[str], list[int]],
    reference: Callable[[str], list[int]],
    texts: Sequence[str],
) -> tuple[Ids, Ids] | None:
    """Find what the post-processor puts around every prompt; None if it does something else."""
    inner, outer = encode("x"), reference("x")
    for start in range(len(outer) - len(inner) + 1):
        before, after = outer[:start], outer[start + len(inner) :]
        if all(before + encode(text) + after == reference(text) for text in texts):
            return tuple(before), tuple(after)
    return None
