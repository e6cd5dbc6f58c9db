"""How a server renders chats, found out from vLLM itself, and compared with it, at start-up.

A kind of message whose probes do not come out of `rendering.render` as they come out of vLLM is
left to vLLM; if plain messages do not, all chats are.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from .rendering import Chat, Message, Shapes, render

_METHODS = ("apply_chat_template", "get_chat_template")
# Variables that every request sets, whatever the server's defaults say.
_REQUESTED = frozenset({"add_generation_prompt", "continue_final_message"})

# Contents that no token consists of, so that the tokens of a rendering are the template's.
_USER, _ANSWER, _PADDED = "Qz7 ünïq", "Vk3\nWq", "  Jx9 "
_CONVERSATIONS = [
    [("user", _USER)],
    [("system", _PADDED), ("user", _USER)],
    [("user", _USER), ("assistant", _ANSWER), ("user", " ")],
    [("system", _PADDED), ("user", ""), ("assistant", _ANSWER), ("user", _USER)],
    [("user", _USER), ("assistant", _ANSWER)],
]
_PARTS = [{"type": "text", "text": text} for text in (_USER, "", _ANSWER)]

Probe = tuple[str, list[Message], bool, bool]
Reference = Callable[[list[Message], bool, bool], str]


def overridden(tokenizer: Any, methods: Sequence[str]) -> str | None:
    """Name the first of `methods` that a class other than transformers' and vLLM's defines."""
    for method in methods:
        for owner in type(tokenizer).__mro__:
            if method not in vars(owner) or owner.__module__ == "vllm.tokenizers.hf":
                continue
            if not owner.__module__.startswith("transformers.tokenization_"):
                return f"{owner.__name__} has its own {method}"
            break
    return None


def prepare_chat(
    tokenizer: Any,
    model_config: Any,
    chat_template: str | None,
    content_format: str,
    defaults: dict[str, Any],
) -> tuple[Chat | str, list[str]]:
    """Return how to render, or one line why not, and what the probes render to."""
    if model_config.hf_config.model_type == "gpt_oss":
        return "harmony prompts are not rendered from a template", []
    if model_config.enable_prompt_embeds:
        return "--enable-prompt-embeds tokenizes inside the renderer", []
    if (reason := overridden(tokenizer, _METHODS)) is not None:
        return reason, []
    try:
        chat = _resolve(tokenizer, model_config, chat_template, content_format, defaults)
        if isinstance(chat, str):
            return chat, []
        reference = _reference(chat, tokenizer, model_config, chat_template, defaults)
        with _quiet("vllm.renderers.hf"):
            return compare(chat, reference)
    except Exception as error:  # a vLLM or transformers that looks different from those known here
        return f"preparing the chat template failed: {type(error).__name__}: {error}", []


def _resolve(
    tokenizer: Any,
    model_config: Any,
    chat_template: str | None,
    content_format: str,
    defaults: dict[str, Any],
) -> Chat | str:
    """Ask vLLM for the template, the content format and the variables."""
    from transformers.utils.chat_template_utils import _compile_jinja_template
    from vllm.renderers import hf

    source = hf.resolve_chat_template(tokenizer, chat_template, None, model_config=model_config)
    if source is None:
        return "the model has no chat template"
    standard = set(inspect.signature(tokenizer.apply_chat_template).parameters)
    standard |= set(inspect.signature(_base().apply_chat_template).parameters)
    if taken := (defaults.keys() - _REQUESTED) & {*standard, "messages"}:
        return f"--default-chat-template-kwargs sets {', '.join(sorted(taken))}"
    wrap = hf.resolve_chat_template_content_format(
        chat_template, None, content_format, tokenizer, model_config=model_config
    )
    variables = hf.resolve_chat_template_kwargs(tokenizer, source, defaults)
    variables = {**tokenizer.special_tokens_map, **variables}
    for key in _REQUESTED:
        variables.pop(key, None)
    template = _compile_jinja_template(source)
    # A ChainMap, which jinja copies for every rendering: two thirds of a short prompt's time.
    template.globals = dict(template.globals)
    return Chat(source, template, variables, wrap == "openai")


def _base() -> Any:
    from transformers import PreTrainedTokenizerBase

    return PreTrainedTokenizerBase


def _reference(
    chat: Chat,
    tokenizer: Any,
    model_config: Any,
    chat_template: str | None,
    defaults: dict[str, Any],
) -> Reference:
    """Return vLLM's way from messages to text, as its chat route takes it."""
    try:
        from vllm.renderers.chat_utils import parse_chat_messages
    except ImportError:  # until 0.31
        from vllm.entrypoints.chat_utils import parse_chat_messages
    from vllm.renderers.hf import safe_apply_chat_template

    def reference(messages: list[Message], generate: bool, continued: bool) -> str:
        conversation = parse_chat_messages(
            messages, model_config, "openai" if chat.wrap else "string"
        )[0]
        options = {"add_generation_prompt": generate, "continue_final_message": continued}
        text: str = safe_apply_chat_template(
            model_config,
            tokenizer,
            conversation,
            chat_template=chat_template,
            tokenize=False,
            return_dict=False,
            **{**defaults, **options},
        )
        return text

    return reference


def compare(chat: Chat, reference: Reference) -> tuple[Chat | str, list[str]]:
    """Turn off every shape with a probe that `reference` renders differently."""
    wrong = set()
    renderings = []
    for shape, messages, generate, continued in _probes():
        expected = _attempt(reference, messages, generate, continued)
        if render(chat, messages, generate, continued) != expected:
            # Once more: a template may print the time.
            expected = _attempt(reference, messages, generate, continued)
            if render(chat, messages, generate, continued) != expected:
                wrong.add(shape)
        if expected is not None:
            renderings.append(expected)
    if "plain" in wrong:
        return "the template renders differently when it is called directly", renderings
    return replace(chat, shapes=replace(Shapes(), **dict.fromkeys(wrong, False))), renderings


def _attempt(
    reference: Reference, messages: list[Message], generate: bool, continued: bool
) -> str | None:
    try:
        return reference(messages, generate, continued)
    except Exception:  # refused, as `render` should
        return None


def _probes() -> list[Probe]:
    """Return (shape, messages, add_generation_prompt, continue_final_message) to compare."""
    probes: list[Probe] = []
    late = {"role": "developer", "content": _PADDED}
    for pairs in _CONVERSATIONS:
        messages: list[Message] = [{"role": role, "content": text} for role, text in pairs]
        named = [{**message, "name": "Zq5"} for message in messages]
        parts = [{**message, "content": _PARTS} for message in messages]
        empty = [*messages[:-1], {**messages[-1], "content": []}]
        for generate in (True, False):
            probes += [
                ("plain", messages, generate, False),
                ("names", named, generate, False),
                ("parts", parts, generate, False),
                ("parts", empty, generate, False),
                ("developer", [late, *messages], generate, False),
                ("developer", [*messages, late], generate, False),
                ("developer", [late, {**late, "content": ""}, *messages], generate, False),
            ]
        probes += [("continued", each, False, True) for each in (messages, named, parts)]
    return probes


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a logger from reporting the probes that a template refuses."""
    logger = logging.getLogger(name)
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
