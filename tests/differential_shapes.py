"""Request shapes of the differential suite: how one is made, and every parameter of both routes.

A shape is bytes to send, so both servers get the same ones. `both` makes four of one idea: chat and
completion, streaming and not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .differential_client import AUTHORITY, Client, Exchange

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
FRANCE = "What is the capital of France?"
PROMPT = f"<|begin|><|user|>{FRANCE}<|end|><|assistant|>"
"""What the demo model's template makes of FRANCE; greedy: "The capital of France is Paris."."""

ABSENT = object()
"""As the value of a field: leave out a field that shapes otherwise have."""

# Tokens of the demo model.
EOS, EXCLAMATION, DOT, CAPITAL, FRANCE_TOKEN, PARIS = 2, 6, 19, 328, 1454, 1747
SMILE = (178, 259, 252, 228)
"""The four bytes of 😀, each a token: none of them is text by itself."""


@dataclass(frozen=True)
class Shape:
    """One exchange with a server.

    `phases` are sent one after the other, a response is read per entry of `methods`. `alone` gives
    the shape a connection of its own, whose fate is then compared too. `fast`: common enough that
    the fast lane has to serve it.
    """

    id: str
    phases: tuple[bytes, ...]
    methods: tuple[str, ...] = ("POST",)
    alone: bool = False
    fast: bool = False

    def send(self, client: Client) -> Exchange:
        """Have the exchange over a client."""
        if self.alone:
            return client.talk(self.phases, self.methods)
        return client.request(self.phases[0], self.methods[0])


def encode(
    path: str,
    body: bytes | str | dict[str, Any] | list[Any] | None = None,
    method: str = "POST",
    headers: dict[str, str] | None = None,
) -> bytes:
    """An HTTP/1.1 request. A header given as "" is left out; a dict or list becomes JSON."""
    if isinstance(body, dict | list):
        body = json.dumps(body)
    data = body.encode() if isinstance(body, str) else body
    fields = {"host": AUTHORITY}
    if data is not None:
        fields |= {"content-type": "application/json", "content-length": str(len(data))}
    fields |= headers or {}
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items() if v)]
    return "\r\n".join([*lines, "", ""]).encode("utf-8") + (data or b"")


def request(
    name: str,
    path: str,
    body: bytes | str | dict[str, Any] | list[Any] | None = None,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    fast: bool = False,
) -> Shape:
    """A shape of one ordinary request."""
    return Shape(name, (encode(path, body, method, headers),), (method,), fast=fast)


def user(*contents: Any) -> list[dict[str, Any]]:
    """Messages of a conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def chat_body(**fields: Any) -> dict[str, Any]:
    """A chat request, greedy and short; `fields` override."""
    body = {"model": "demo", "messages": user(FRANCE), "temperature": 0, "max_tokens": 16}
    return {key: value for key, value in {**body, **fields}.items() if value is not ABSENT}


def completion_body(**fields: Any) -> dict[str, Any]:
    """A completion request, greedy and short; `fields` override."""
    body = {"model": "demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 16}
    return {key: value for key, value in {**body, **fields}.items() if value is not ABSENT}


def chat(name: str, fast: bool = False, **fields: Any) -> Shape:
    """A chat shape."""
    return request(f"chat-{name}", CHAT, chat_body(**fields), fast=fast)


def completion(name: str, fast: bool = False, **fields: Any) -> Shape:
    """A completion shape."""
    return request(f"completion-{name}", COMPLETION, completion_body(**fields), fast=fast)


def routes(name: str, fast: bool = False, **fields: Any) -> list[Shape]:
    """The same fields on both routes."""
    return [chat(name, fast, **fields), completion(name, fast, **fields)]


def streams(make: Any, name: str, fast: bool = False, **fields: Any) -> list[Shape]:
    """`make` a shape twice: streaming and not."""
    return [make(name, fast, **fields), make(f"{name}-stream", fast, stream=True, **fields)]


def both(name: str, fast: bool = False, **fields: Any) -> list[Shape]:
    """The same fields on both routes, streaming and not."""
    return streams(chat, name, fast, **fields) + streams(completion, name, fast, **fields)


def forced(tokens: tuple[int, ...], **fields: Any) -> dict[str, Any]:
    """Fields that make the model say exactly these (distinct) tokens, one after the other.

    Each has a bias that outweighs the model and the tokens after it; a penalty so strong that a
    token already said falls behind all others keeps it from being said twice.
    """
    step = 100 / (len(tokens) + 1)
    bias = {str(token): round(100 - i * step, 2) for i, token in enumerate(tokens)}
    return {
        "logit_bias": bias,
        "repetition_penalty": 1000.0,
        "max_tokens": len(tokens),
        "ignore_eos": True,
    } | fields


_RANDOM: dict[str, Any] = {"temperature": 2.0, "logit_bias": {str(EOS): -100}}
"""Past the end of its answer the model knows no more what to say: the seed decides."""

# Served by the fast lane: what clients send every day. (name, fields)
_COMMON: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {}),
    ("no-limit", {"max_tokens": None}),
    ("one-token", {"max_tokens": 1}),
    ("cut", {"max_tokens": 5}),
    ("stop", {"stop": "France"}),
    ("stop-list", {"stop": ["Rome", " is"]}),
    ("stop-list-four", {"stop": ["a1", "b2", "c3", "Paris"]}),
    ("stop-across-tokens", {"stop": "l of Fr"}),
    ("stop-across-many-tokens", {"stop": "capital of France is"}),
    ("stop-nearly", {"stop": "France iz"}),
    ("stop-nearly-at-end", {"stop": "Paris.!"}),
    ("stop-first-of-two", {"stop": ["France", "of France"]}),
    ("stop-is-whole-text", {"stop": "The capital of France is Paris."}),
    ("stop-first-letter", {"stop": "T"}),
    ("stop-included", {"stop": "l of Fr", "include_stop_str_in_output": True}),
    ("stop-unmet-included", {"stop": "Rome", "include_stop_str_in_output": True}),
    ("stop-empty-list", {"stop": []}),
    ("stop-null", {"stop": None}),
    ("stop-with-min-tokens", {"stop": "capital", "min_tokens": 4}),
    ("stop-token", {"stop_token_ids": [FRANCE_TOKEN]}),
    ("stop-token-included", {"stop_token_ids": [DOT, 7], "include_stop_str_in_output": True}),
    ("stop-token-and-string", {"stop": ["Paris"], "stop_token_ids": [FRANCE_TOKEN]}),
    ("min-tokens", {"min_tokens": 12}),
    ("ignore-eos", {"ignore_eos": True, "max_tokens": 20}),
    ("seed", {"seed": 7, **_RANDOM}),
    ("seed-negative", {"seed": -3, **_RANDOM}),
    ("seed-top-p-top-k", {"seed": 11, **_RANDOM, "top_p": 0.9, "top_k": 20}),
    ("seed-min-p", {"seed": 5, **_RANDOM, "min_p": 0.01}),
    ("top-k-one", {"temperature": 1.0, "top_k": 1}),
    ("frequency-penalty", {"frequency_penalty": 2.0, "max_tokens": 20, "ignore_eos": True}),
    ("presence-penalty", {"presence_penalty": -2.0, "max_tokens": 20, "ignore_eos": True}),
    ("repetition-penalty", {"repetition_penalty": 1.5, "max_tokens": 20}),
    ("logit-bias", {"logit_bias": {str(PARIS): -100}}),
    ("logit-bias-force", {"logit_bias": {"20": 50.5, str(EOS): -100}, "max_tokens": 4}),
    ("vllm-xargs", {"vllm_xargs": {"tenant": "a", "weight": 2, "ratio": 0.5, "list": ["x", 1]}}),
    ("cache-salt", {"cache_salt": "pepper"}),
    ("user", {"user": "user-1234"}),
    ("torn-emoji", forced(SMILE)),
    ("torn-emoji-unfinished", forced(SMILE[:3])),
    ("torn-emoji-then-text", forced((*SMILE, PARIS))),
    ("torn-emoji-broken-by-text", forced((*SMILE[:2], PARIS, DOT))),
    ("torn-emoji-stop", forced((*SMILE, PARIS, DOT), stop=" Par")),
    ("stop-is-emoji", forced((PARIS, *SMILE, DOT), stop="😀")),
    ("stop-is-emoji-included",
     forced((PARIS, *SMILE, DOT), stop="😀", include_stop_str_in_output=True)),
    ("stop-token-inside-emoji", forced(SMILE, stop_token_ids=[SMILE[2]])),
    ("lone-bytes", forced((252, 228, 178, 133))),
    ("lone-bytes-then-text", forced((252, 228, PARIS, 178, DOT))),
    ("stop-emoji-and-quote", forced((*SMILE, 7, 242), stop="😀\"")),
)  # fmt: skip

# Right requests that a fast lane need not know.
_OTHER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("temperature-null-seed", {"temperature": None, "seed": 3}),
    ("integers-as-floats", {"max_tokens": 5.0, "seed": 7.0}),
    ("numbers-as-strings", {"max_tokens": "5", "temperature": "0"}),
    ("stop-five", {"stop": ["a", "b", "c", "d", "e"]}),
    ("stop-empty-string", {"stop": ""}),
    ("stop-with-empty-string", {"stop": ["", "France"]}),
    ("special-tokens-kept",
     {"skip_special_tokens": False, "ignore_eos": True, "max_tokens": 14}),
    ("special-tokens-skipped", {"ignore_eos": True, "max_tokens": 40}),
    ("special-tokens-stop", {"skip_special_tokens": False, "stop": "<|end|>"}),
    ("no-spaces-between", {"spaces_between_special_tokens": False}),
    ("n-two-greedy", {"n": 2}),
    ("n-two-seed", {"n": 2, "seed": 1, **_RANDOM}),
    ("n-three-stop", {"n": 3, "seed": 2, **_RANDOM, "stop": " of Fr"}),
    ("unknown-field", {"no_such_field": {"a": [1, 2]}}),
    ("request-id", {"request_id": "my-own-id"}),
    ("session-id", {"session_id": "session-a"}),
    ("priority-zero", {"priority": 0}),
    ("priority-without-policy", {"priority": 1}),
    ("stream-interval", {"stream_interval": 3}),
    ("return-token-ids", {"return_token_ids": True}),
    ("return-token-ids-torn", forced((*SMILE, PARIS), return_token_ids=True)),
    ("return-token-offsets", {"return_token_offsets": True}),
    ("truncate", {"truncate_prompt_tokens": 6}),
    ("truncate-right", {"truncate_prompt_tokens": 6, "truncation_side": "right"}),
    ("truncate-max", {"truncate_prompt_tokens": -1}),
    ("allowed-tokens", {"allowed_token_ids": [CAPITAL, DOT], "max_tokens": 5}),
    ("bad-words", {"bad_words": ["The capital", " of"]}),
    ("choice", {"structured_outputs": {"choice": ["Rome", "Oslo"]}}),
    ("choice-emoji", {"structured_outputs": {"choice": ["😀🎉"]}}),
    ("regex", {"structured_outputs": {"regex": "[a-c]{3}[0-9]{2}"}}),
    ("json-schema", {"response_format": {"type": "json_schema", "json_schema": {
        "name": "city", "schema": {
            "type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["n"], "additionalProperties": False}}}}),
    ("json-object", {"response_format": {"type": "json_object"}, "max_tokens": 8}),
    ("format-text", {"response_format": {"type": "text"}}),
    ("beam-search", {"use_beam_search": True, "n": 2, "max_tokens": 5}),
    ("repetition-detection", {"ignore_eos": True, "max_tokens": 30, "repetition_detection": {
        "max_pattern_size": 4, "min_pattern_size": 1, "min_count": 2}}),
    ("thinking-budget", {"thinking_token_budget": 5}),
    ("kv-transfer", {"kv_transfer_params": {"do_remote_prefill": False}}),
    ("special-tokens-added", {"add_special_tokens": True}),
)  # fmt: skip

# Only with stream: (name, stream_options or what else)
_STREAMING: tuple[tuple[str, dict[str, Any]], ...] = (
    ("usage", {"stream_options": {"include_usage": True}}),
    ("usage-off", {"stream_options": {"include_usage": False}}),
    ("usage-null", {"stream_options": {"include_usage": None}}),
    ("usage-stop", {"stream_options": {"include_usage": True}, "stop": " of Fr"}),
)
_STREAMING_OTHER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("options-empty", {"stream_options": {}}),
    ("options-null", {"stream_options": None}),
    ("options-unknown", {"stream_options": {"include_usage": True, "no_such": 1}}),
    ("usage-continuous",
     {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    ("usage-continuous-only", {"stream_options": {"continuous_usage_stats": True}}),
    ("usage-continuous-torn",
     forced(SMILE, stream_options={"include_usage": True, "continuous_usage_stats": True})),
    ("usage-n-two", {"n": 2, "seed": 3, **_RANDOM, "stream_options": {"include_usage": True}}),
    ("options-wrong", {"stream_options": "yes"}),
    ("options-wrong-usage", {"stream_options": {"include_usage": "maybe"}}),
    ("interval-large", {"stream_interval": 100}),
    ("interval-stop", {"stream_interval": 4, "stop": "France"}),
    ("token-ids-usage", {"return_token_ids": True, "stream_options": {"include_usage": True}}),
)  # fmt: skip

# Refused, or close to it.
_BOUNDARIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("max-tokens-zero", {"max_tokens": 0}),
    ("max-tokens-negative", {"max_tokens": -1}),
    ("max-tokens-huge", {"max_tokens": 1_000_000}),
    ("max-tokens-fits", {"max_tokens": 2037, "stop": "."}),
    ("max-tokens-fits-not", {"max_tokens": 2038, "stop": "."}),
    ("max-tokens-model-length", {"max_tokens": 2048, "stop": "."}),
    ("max-tokens-above-model-length", {"max_tokens": 2049, "stop": "."}),
    ("max-tokens-beyond-64-bits", {"max_tokens": 2**70}),
    ("max-tokens-fraction", {"max_tokens": 1.5}),
    ("max-tokens-true", {"max_tokens": True}),
    ("min-above-max", {"min_tokens": 20, "max_tokens": 10}),
    ("min-tokens-negative", {"min_tokens": -1}),
    ("temperature-negative", {"temperature": -0.1}),
    ("temperature-tiny", {"temperature": 1e-6}),
    ("temperature-high", {"temperature": 2.1, "seed": 1}),
    ("temperature-string", {"temperature": "warm"}),
    ("top-p-zero", {"top_p": 0}),
    ("top-p-above", {"top_p": 1.1}),
    ("top-k-minus-one", {"top_k": -1}),
    ("top-k-minus-two", {"top_k": -2}),
    ("top-k-huge", {"top_k": 1_000_000}),
    ("min-p-above", {"min_p": 1.5}),
    ("min-p-negative", {"min_p": -0.5}),
    ("frequency-penalty-above", {"frequency_penalty": 2.1}),
    ("presence-penalty-below", {"presence_penalty": -2.1}),
    ("repetition-penalty-zero", {"repetition_penalty": 0}),
    ("repetition-penalty-negative", {"repetition_penalty": -1}),
    ("seed-64-bits", {"seed": 2**63 - 1}),
    ("seed-beyond-64-bits", {"seed": 2**63}),
    ("n-zero", {"n": 0}),
    ("n-negative", {"n": -1}),
    ("n-huge", {"n": 100_000}),
    ("logit-bias-not-a-token", {"logit_bias": {"x": 1}}),
    ("logit-bias-no-such-token", {"logit_bias": {"99999": 1}}),
    ("logit-bias-beyond", {"logit_bias": {"20": 1000}}),
    ("logit-bias-empty", {"logit_bias": {}}),
    ("stop-number", {"stop": 5}),
    ("stop-list-numbers", {"stop": [1, 2]}),
    ("stop-list-null", {"stop": [None]}),
    ("stop-tokens-strings", {"stop_token_ids": ["a"]}),
    ("stop-tokens-unknown", {"stop_token_ids": [99999]}),
    ("allowed-tokens-empty", {"allowed_token_ids": []}),
    ("allowed-tokens-unknown", {"allowed_token_ids": [99999]}),
    ("bad-words-empty-string", {"bad_words": [""]}),
    ("cache-salt-empty", {"cache_salt": ""}),
    ("cache-salt-slash", {"cache_salt": "a/b"}),
    ("cache-salt-long", {"cache_salt": "s" * 129}),
    ("cache-salt-number", {"cache_salt": 5}),
    ("priority-beyond-64-bits", {"priority": 2**63}),
    ("priority-string", {"priority": "high"}),
    ("options-without-stream", {"stream_options": {"include_usage": True}}),
    ("stream-interval-zero", {"stream_interval": 0}),
    ("truncate-zero", {"truncate_prompt_tokens": 0}),
    ("truncate-minus-two", {"truncate_prompt_tokens": -2}),
    ("truncate-above", {"truncate_prompt_tokens": 1_000_000}),
    ("truncation-side", {"truncation_side": "middle"}),
    ("structured-two", {"structured_outputs": {"regex": "a", "choice": ["a"]}}),
    ("structured-none", {"structured_outputs": {}}),
    ("structured-bad-regex", {"structured_outputs": {"regex": "(["}}),
    ("format-unknown", {"response_format": {"type": "yaml"}}),
    ("format-schema-missing", {"response_format": {"type": "json_schema"}}),
    ("xargs-nested", {"vllm_xargs": {"a": {"b": 1}}}),
    ("xargs-list", {"vllm_xargs": [1]}),
    ("xargs-empty", {"vllm_xargs": {}}),
    ("model-wrong", {"model": "no-such-model"}),
    ("model-missing", {"model": ABSENT}),
    ("model-null", {"model": None}),
    ("model-empty", {"model": ""}),
    ("model-number", {"model": 5}),
    ("model-path", {"model": "../demo"}),
    ("kv-transfer-wrong", {"kv_transfer_params": "x"}),
    ("request-id-number", {"request_id": 5}),
    ("beam-search-too-wide", {"use_beam_search": True, "n": 5000}),
)  # fmt: skip


def _words(text: str) -> list[str]:
    return text.split()


# Every field of upstream's protocol classes, for null and for a value of the wrong type.
_FIELDS = _words("""
    frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream
    stream_options temperature top_p user use_beam_search top_k min_p repetition_penalty
    watermarking length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
    skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
    allowed_token_ids prompt_logprobs logprob_token_ids bad_words echo add_special_tokens
    response_format structured_outputs priority request_id session_id
    return_tokens_as_token_ids return_token_ids routed_experts_prompt_start
    return_token_offsets mm_payload return_mm_kwargs cache_salt kv_transfer_params
    ec_transfer_params vllm_xargs repetition_detection thinking_token_budget stream_interval
""")
_CHAT_FIELDS = _words("""
    messages max_completion_tokens top_logprobs tools tool_choice reasoning_effort
    include_reasoning parallel_tool_calls add_generation_prompt continue_final_message documents
    chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs return_prompt_text
""")
_COMPLETION_FIELDS = _words("prompt suffix prompt_embeds")


def _field_shapes() -> Iterator[Shape]:
    # Two tokens suffice where the value is accepted; a null temperature needs a seed.
    short: dict[str, Any] = {"max_tokens": 2, "seed": 1}
    for kind, value in (("null", None), ("wrong", {"x": [{}]})):
        for field in _FIELDS + _CHAT_FIELDS:
            yield chat(f"{kind}-{field}", **{**short, field: value})
        for field in _FIELDS + _COMPLETION_FIELDS:
            yield completion(f"{kind}-{field}", **{**short, field: value})


def parameter_shapes() -> list[Shape]:
    """Shapes that differ in parameters which both routes share."""
    shapes: list[Shape] = []
    for name, fields in _COMMON:
        shapes += both(name, fast=True, **fields)
    for i, (name, fields) in enumerate(_OTHER):
        shapes.append(chat(name, **{**fields, "stream": i % 2 == 0}))
        shapes.append(completion(name, **{**fields, "stream": i % 2 == 1}))
    for name, fields in _STREAMING:
        shapes += routes(name, fast=True, stream=True, **fields)
    for name, fields in _STREAMING_OTHER:
        shapes += routes(name, stream=True, **fields)
    shapes += routes("stream-as-string", stream="true")
    for name, fields in _BOUNDARIES:
        shapes += routes(name, **fields)
    return [*shapes, *_field_shapes()]
