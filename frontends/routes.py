"""The two routes of the fast lane: from a body to vLLM's own request objects, and its templates.

What a parameter means stays vLLM's business: a body is put into an instance of vLLM's own request
class (unvalidated: `bodies.py` has seen to the types), and vLLM's methods make the sampling
parameters from it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import JSONResponse

from scalellm_plugins.errors import TermError
from scalellm_plugins.scheduling import terms

from . import bodies, probes
from .prompts import ChatPrompts
from .segments import Plan
from .templates import StreamTemplates, Template


@dataclass(slots=True)
class Ask:
    """One request, decoded."""

    route: Route
    body: Any
    request_id: str
    """As the client will see it, such as "chatcmpl-…"."""
    engine_id: str
    """As the engine client would be given it; it appends random characters."""
    created: int
    arrival_time: float
    priority: int | None
    session_id: str | None
    kind: probes.StreamKind | None
    """None: one document."""
    origin: bytes | None = None
    length: int = 0
    """Bytes of the body."""
    terms: dict[str, Any] | None = None
    """What the request says about its scheduling, valid; taken out of `body.vllm_xargs`."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the lane takes from a request's headers."""

    request_id: str | None = None
    priority: int | None = None
    session_id: str | None = None
    origin: bytes | None = None
    terms: dict[str, Any] | None = None


def _session(body: Any, asked: Asked) -> str | None:
    """The request's session: of its body, a header or its extra arguments, as in vLLM."""
    if body.session_id:
        return str(body.session_id)
    if asked.session_id:
        return asked.session_id
    extra = (body.vllm_xargs or {}).get("session_id")
    return extra if isinstance(extra, str) and extra else None


def _take_terms(body: Any, in_headers: dict[str, Any] | None) -> dict[str, Any]:
    """Take the terms out of the extra arguments: they may differ from request to request, and the
    other parameters, from which patterns are made, do not. Those in headers come before them.

    Raises:
        TermError: one is not valid.
    """
    said = terms.in_body(body.vllm_xargs)
    if said:
        left = {name: value for name, value in body.vllm_xargs.items() if name not in said}
        body.vllm_xargs = left or None
    return said if in_headers is None else said | in_headers


class Route:
    """What both routes share."""

    path: str
    prefix: str
    class_name: str
    probe_stream: Callable[[Any, Any, probes.StreamKind], Awaitable[StreamTemplates]]
    probe_full: Callable[[Any, Any], Awaitable[Template]]

    def __init__(self, handler: Any, prompts: ChatPrompts) -> None:
        from vllm import envs

        self.handler = handler
        self.prompts = prompts
        module = sys.modules[type(handler).__module__]
        self.request_class = getattr(module, self.class_name)
        self._get_max_tokens = module.get_max_tokens
        self._defaults = self._prototype().__dict__
        self._private = self._prototype().__pydantic_private__
        self.decoder = self._decoder(self.request_class.model_fields)
        self.streams: dict[probes.StreamKind, StreamTemplates] = {}
        self.full: Template = Template(())
        config = handler.model_config
        self.max_model_len: int = config.max_model_len
        # A longer text has too many tokens, whatever they are: vLLM refuses it without tokenizing.
        self.max_chars = self.max_model_len * getattr(
            handler.renderer.tokenizer, "max_chars_per_token", 1024
        )
        # Part of the request classes of every supported release.
        self.max_stops: int | None = getattr(envs, "VLLM_MAX_STOP_STRINGS", None)
        self.force_usage = bool(handler.enable_force_include_usage)

    def _decoder(self, known: Any) -> msgspec.json.Decoder[Any]:
        raise NotImplementedError

    def _prototype(self) -> Any:
        raise NotImplementedError

    async def learn(self, tokenizer: Any) -> None:
        """Learn the templates.

        Raises:
            TemplateError: vLLM's answers look otherwise than known.
        """
        for kind in probes.STREAM_KINDS:
            self.streams[kind] = await self.probe_stream(self.handler, tokenizer, kind)
        self.full = await self.probe_full(self.handler, tokenizer)

    def read(self, raw: bytes, asked: Asked, fallback_id: str) -> Ask | None:
        """Decode a body; None when it is not for the lane."""
        try:
            body = self.decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        if not bodies.is_plain(body) or (body.stream_options is not None and not body.stream):
            return None
        if isinstance(body.stop, list) and len(body.stop) > (self.max_stops or len(body.stop)):
            return None
        try:
            said = asked.terms if body.vllm_xargs is None else _take_terms(body, asked.terms)
        except TermError:
            return None
        base = asked.request_id
        if base is None:
            base = fallback_id if body.request_id is msgspec.UNSET else body.request_id
        now = time.time()
        name = f"{self.prefix}-{base}"
        return Ask(
            route=self,
            body=body,
            request_id=name,
            engine_id=self._engine_id(name),
            created=int(now),
            arrival_time=now,
            priority=asked.priority,
            session_id=_session(body, asked),
            kind=self._kind(body) if body.stream else None,
            origin=asked.origin,
            length=len(raw),
            terms=said,
        )

    def _engine_id(self, name: str) -> str:
        return name

    def _kind(self, body: Any) -> probes.StreamKind:
        options = body.stream_options
        if self.force_usage:
            return True, True
        if options is None or not options.include_usage:
            return False, False
        return True, bool(options.continuous_usage_stats)

    def plan(self, ask: Ask) -> Plan | list[int] | None:
        """Return the prompt's ids or the way to them; None when it is not for the lane."""
        raise NotImplementedError

    def request(self, ask: Ask) -> Any:
        """Return an instance of vLLM's request class, as its validation would have made it."""
        made = self.request_class.__new__(self.request_class)
        given = {
            name: value
            for name in ask.body.__struct_fields__
            if (value := getattr(ask.body, name)) is not msgspec.UNSET
        }
        given.pop("response_format")
        given["stop_token_ids"] = given["stop_token_ids"] or []
        object.__setattr__(made, "__dict__", {**self._defaults, **given})
        object.__setattr__(made, "__pydantic_fields_set__", set(given))
        object.__setattr__(made, "__pydantic_extra__", None)
        object.__setattr__(made, "__pydantic_private__", dict(self._private or {}))
        return made

    def wanted_tokens(self, body: Any) -> int | None:
        """Return the number of tokens asked for, None when it was left open."""
        raise NotImplementedError

    def max_tokens(self, body: Any, prompt_len: int) -> int:
        """Return how many tokens may be generated, by vLLM's own rule.

        Raises:
            ValueError: more were asked for than the context has left.
        """
        wanted = self.wanted_tokens(body)
        if wanted is not None and wanted > self.max_model_len - prompt_len:
            # vLLM clamps this since 0.32 and refused it before: its own code knows.
            raise ValueError("more tokens asked for than the context has left")
        handler = self.handler
        most: int = self._get_max_tokens(
            self.max_model_len,
            wanted,
            prompt_len,
            handler.default_sampling_params,
            handler.override_max_tokens,
        )
        return most

    def sampling_params(self, ask: Ask, prompt_len: int) -> Any:
        """Make vLLM's `SamplingParams`.

        Raises:
            ValueError: as vLLM's own methods; its own code will answer with the right words.
        """
        most = self.max_tokens(ask.body, prompt_len)
        return self.request(ask).to_sampling_params(most, self.handler.default_sampling_params)

    def stream_error(self, error: Exception) -> bytes:
        """Return the event with which vLLM would tell a client about an error on the way."""
        from vllm.exceptions import GenerationError

        if isinstance(error, GenerationError):
            text = self.handler._convert_generation_error_to_streaming_response(error)
        else:
            text = self.handler.create_streaming_error_response(error)
        return f"data: {text}\n\n".encode()

    def error(self, error: Exception) -> tuple[int, bytes]:
        """Return status and body with which vLLM would answer."""
        answer = self.handler.create_error_response(error)
        return answer.error.code, bytes(JSONResponse(answer.model_dump()).body)


class ChatRoute(Route):
    """/v1/chat/completions, over vLLM's `OpenAIServingChat`."""

    path = "/v1/chat/completions"
    prefix = "chatcmpl"
    class_name = "ChatCompletionRequest"
    probe_stream = staticmethod(probes.chat_stream)
    probe_full = staticmethod(probes.chat_full)

    def _decoder(self, known: Any) -> msgspec.json.Decoder[Any]:
        return bodies.chat_decoder(known)

    def _prototype(self) -> Any:
        return self.request_class(messages=[{"role": "user", "content": "x"}])

    def plan(self, ask: Ask) -> Plan | list[int] | None:
        """See the base."""
        body = ask.body
        if body.continue_final_message and body.add_generation_prompt:
            return None
        if not body.add_generation_prompt:
            # vLLM then answers in the last message's role; the templates are of the usual one.
            role = body.messages[-1].get("role") if body.messages else None
            if role != self.handler.response_role:
                return None
        text = self.prompts.render(
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )
        if text is None or len(text) > self.max_chars:
            return None
        return self.prompts.plan_chat(text)

    def wanted_tokens(self, body: Any) -> int | None:
        """See the base."""
        wanted: int | None = body.max_completion_tokens
        return body.max_tokens if wanted is None else wanted


class CompletionRoute(Route):
    """/v1/completions, over vLLM's `OpenAIServingCompletion`."""

    path = "/v1/completions"
    prefix = "cmpl"
    class_name = "CompletionRequest"
    probe_stream = staticmethod(probes.completion_stream)
    probe_full = staticmethod(probes.completion_full)

    def _decoder(self, known: Any) -> msgspec.json.Decoder[Any]:
        return bodies.completion_decoder(known)

    def _prototype(self) -> Any:
        return self.request_class(prompt="x")

    def _engine_id(self, name: str) -> str:
        return f"{name}-0"  # vLLM numbers a completion's prompts

    def plan(self, ask: Ask) -> Plan | list[int] | None:
        """See the base."""
        prompt = ask.body.prompt
        if not prompt:
            return None
        if isinstance(prompt, list):
            return prompt
        if len(prompt) > self.max_chars:
            return None
        if ask.body.add_special_tokens:
            return self.prompts.plan_completion(prompt)
        return self.prompts.plan_chat(prompt)

    def wanted_tokens(self, body: Any) -> int | None:
        """See the base."""
        return 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default
