"""Request bodies that the fast lane understands, as msgspec structs.

A struct names what the lane handles, in this release's types; a body with anything else (another
field, another type) does not decode, and goes to vLLM's own code with the same bytes. So the lane
never has to find an error: what is wrong is wrong in vLLM's words.

Pure: imports neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Salt = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^@/\\\x00]*$")]
Xarg = str | int | float | list[str | int | float]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`response_format`, where it asks for nothing."""

    type: Literal["text"]


# Fields with these defaults: as vLLM's request classes have them since 0.29.
_COMMON: dict[str, tuple[Any, Any]] = {
    "model": (str | None, None),
    "frequency_penalty": (float | None, None),
    "presence_penalty": (float | None, None),
    "repetition_penalty": (float | None, None),
    "temperature": (float | None, None),
    "top_p": (float | None, None),
    "top_k": (int | None, None),
    "min_p": (float | None, None),
    "logit_bias": (dict[str, float] | None, None),
    "seed": (Int64 | None, None),
    "stop": (str | list[str] | None, None),
    "stop_token_ids": (list[int] | None, None),
    "include_stop_str_in_output": (bool, False),
    "ignore_eos": (bool, False),
    "min_tokens": (int, 0),
    "max_tokens": (int | None, None),
    "skip_special_tokens": (bool, True),
    "spaces_between_special_tokens": (bool, True),
    "allowed_token_ids": (list[int] | None, None),
    "bad_words": (list[str] | msgspec.UnsetType, msgspec.UNSET),
    "stream": (bool | None, False),
    "stream_options": (StreamOptions | None, None),
    "stream_interval": (Annotated[int, Meta(ge=1)] | None, None),
    "priority": (Int64, 0),
    "request_id": (str | msgspec.UnsetType, msgspec.UNSET),
    "session_id": (str | None, None),
    "cache_salt": (Salt | None, None),
    "vllm_xargs": (dict[str, Xarg] | None, None),
    "response_format": (TextFormat | None, None),
    "user": (str | None, None),
    # Only as they are by default: see `is_plain`.
    "use_beam_search": (bool, False),
    "echo": (bool, False),
}
_CHAT: dict[str, tuple[Any, Any]] = {
    "max_completion_tokens": (int | None, None),
    "n": (Literal[1] | None, 1),
    "logprobs": (bool | None, None),
    "top_logprobs": (Literal[0] | None, None),
    "add_generation_prompt": (bool, True),
    "continue_final_message": (bool, False),
    "tools": (None, None),
    "tool_choice": (Literal["none"] | None, None),
    "parallel_tool_calls": (bool | None, True),
}
_COMPLETION: dict[str, tuple[Any, Any]] = {
    "n": (Literal[1], 1),
    "logprobs": (None, None),
    "suffix": (None, None),
    "add_special_tokens": (bool, True),
}
_UNKNOWN_TO_VLLM: dict[str, tuple[Any, Any]] = {
    # OpenAI's, sent by its clients and ignored by vLLM as any field that it does not know.
    "store": (Any, None),
    "metadata": (Any, None),
    "service_tier": (Any, None),
    "safety_identifier": (Any, None),
    "prompt_cache_key": (Any, None),
}


def is_plain(body: Any) -> bool:
    """Whether no field asks for what only vLLM's own code does."""
    return not (body.use_beam_search or body.echo or body.logprobs)


def decoder(
    name: str,
    required: tuple[str, Any],
    own: dict[str, tuple[Any, Any]],
    known: Collection[str],
) -> msgspec.json.Decoder[Any]:
    """Make the decoder of one route.

    Args:
        name: of the struct.
        required: name and type of the field without which there is no request.
        own: the route's own fields.
        known: names of the fields of this release's request class. A field that we handle and it
            does not know would be ignored by it: such a body is left to it. The other way round,
            a field that it has learnt to use is no longer one to ignore.
    """
    fields: list[Any] = [required]
    fields += [
        (field, *typed) for field, typed in (_COMMON | own).items() if not known or field in known
    ]
    fields += [
        (field, *typed) for field, typed in _UNKNOWN_TO_VLLM.items() if known and field not in known
    ]
    struct = msgspec.defstruct(name, fields, forbid_unknown_fields=True, kw_only=True, gc=False)
    return msgspec.json.Decoder(struct)


def chat_decoder(known: Collection[str]) -> msgspec.json.Decoder[Any]:
    """Bodies of /v1/chat/completions; `messages` are plain dicts, seen through by prompts.py."""
    return decoder("ChatBody", ("messages", list[dict[str, Any]]), _CHAT, known)


def completion_decoder(known: Collection[str]) -> msgspec.json.Decoder[Any]:
    """Bodies of /v1/completions with one prompt, as text or as token ids."""
    return decoder("CompletionBody", ("prompt", str | list[int]), _COMPLETION, known)
