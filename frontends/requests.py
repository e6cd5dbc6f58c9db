"""Requests for the engine: vLLM's own checks once per set of parameters, then copies.

Clients send the same parameters again and again. vLLM builds, verifies and clones them for every
request (`to_sampling_params` and `InputProcessor.process_inputs`). Here the first request with some
parameters goes through all that, and what comes out is the pattern for the next: nothing in it
depends on the prompt, except its length through the clamp on `max_tokens`, which each one gets.
Prompts given as token ids are checked by vLLM each time.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from copy import copy
from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec

from scalellm_plugins.engine.holding import HOLD
from scalellm_plugins.scheduling import terms

from .routes import Ask, Route

if TYPE_CHECKING:
    from .bound import Bound

logger = logging.getLogger("vllm.scalellm")

_PATTERNS = 1024
"""Sets of parameters that are remembered; a client that varies one with every request fills it."""

_OF_THE_REQUEST = frozenset(
    {
        "messages",
        "prompt",
        "model",
        "max_tokens",
        "max_completion_tokens",
        "request_id",
        "session_id",
        "cache_salt",
        "priority",
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "stream_options",
        "add_generation_prompt",
        "continue_final_message",
        "add_special_tokens",
        "parallel_tool_calls",
    }
)
"""Fields that do not end up in the sampling parameters, or are applied to each request."""


def _nothing(_unset: Any) -> None:
    return None


def reserve_names(input_processor: Any) -> None:
    """Drop extra arguments with our names from what clients send (`vllm_xargs`), in both lanes.

    They speak to the engine's side of this package (`HOLD`), and are added after this. A request's
    terms are let through; where a tenants file binds it, that has the last word on them (ways.py).
    """
    make = input_processor.process_inputs

    def process_inputs(request_id: str, prompt: Any, params: Any, *args: Any, **more: Any) -> Any:
        request = make(request_id, prompt, params, *args, **more)
        made = request.sampling_params
        if made is not None and made.extra_args:
            kept = {
                name: value
                for name, value in made.extra_args.items()
                if not name.startswith(terms.PREFIX) or name in terms.SAID
            }
            made.extra_args = kept or None
        return request

    input_processor.process_inputs = process_inputs


class _Pattern:
    """A checked request, and its parameters by `max_tokens`."""

    __slots__ = ("params", "request")

    def __init__(self, request: Any) -> None:
        self.request = request
        self.params = {request.sampling_params.max_tokens: request.sampling_params}


class RequestMaker:
    """Makes `EngineCoreRequest`s for one route."""

    def __init__(self, engine_client: Any, route: Route, supported_tasks: tuple[str, ...]) -> None:
        from vllm.inputs import tokens_input

        self._client = engine_client
        self._route = route
        self._tasks = supported_tasks
        self._tokens_input = tokens_input
        self._patterns: dict[Any, _Pattern] = {}
        fields = route.decoder.type.__struct_fields__
        self._parameters = attrgetter(*[name for name in fields if name not in _OF_THE_REQUEST])

    def make(self, ask: Ask, ids: list[int], hold: int | None, bound: Bound | None = None) -> Any:
        """Return an `EngineCoreRequest`, or None: then vLLM's own code answers with the reason.

        Args:
            ask: what the client wants.
            ids: its prompt.
            hold: how many tokens the engine shall keep together; 0 all, None sends each.
            bound: what the entry of the client's tenant makes of it, where there is a file.
        """
        try:
            self._check_admission(ask.engine_id)
            request = self._make(ask, ids, hold, bound)
        except Exception as error:
            logger.debug("left to vLLM's own code: %s", error)
            return None
        said = ask.terms
        if said and bound is not None:
            said = bound.own(said)
        if said:
            params = request.sampling_params = copy(request.sampling_params)  # the pattern's own
            params.extra_args = {**(params.extra_args or {}), **said}
        if self._plain_ids:
            name = request.external_req_id = request.request_id
            request.request_id = f"{name}-{os.urandom(4).hex()}"
        else:
            self._client.input_processor.assign_request_id(request)
        return request

    @functools.cached_property
    def _plain_ids(self) -> bool:
        """Whether vLLM adds eight random digits to a request's id, and nothing else.

        It makes a UUID for them and asks its environment first: 35-40 µs with cold caches.
        """
        probe: Any = SimpleNamespace(request_id="probe", external_req_id=None)
        try:
            self._client.input_processor.assign_request_id(probe)
        except Exception:
            return False
        random = re.fullmatch("probe-[0-9a-f]{8}", probe.request_id)
        return (
            random is not None
            and vars(probe).keys() == {"request_id", "external_req_id"}
            and (probe.external_req_id == "probe")
        )

    def _check_admission(self, request_id: str) -> None:
        """Ask vLLM whether its own queue limits have room; it counts the refusal when it answers.

        (It is asked again there, and would otherwise count one refusal twice.)
        """
        client = self._client
        client._record_admission_rejection = _nothing
        try:
            client.check_admission(request_id=request_id)
        finally:
            del client._record_admission_rejection

    def _make(self, ask: Ask, ids: list[int], hold: int | None, bound: Bound | None) -> Any:
        body = ask.body
        key: Any = (self._parameters(body), hold, None if bound is None else bound.key)
        try:
            pattern = self._patterns.get(key)
        except TypeError:  # a list or a mapping among the parameters
            # UNSET cannot be encoded; it stands where null would not have decoded.
            key = (msgspec.json.encode(key[0], enc_hook=_nothing), *key[1:])
            pattern = self._patterns.get(key)
        if pattern is None or isinstance(getattr(body, "prompt", None), list):
            return self._checked(ask, ids, hold, bound, key)
        most = self._route.max_tokens(body, len(ids))
        params = pattern.params.get(most)
        if params is None:
            params = self._with_max_tokens(pattern, most)
        request = copy(pattern.request)
        request.request_id = ask.engine_id
        request.prompt_token_ids = ids
        request.sampling_params = params
        request.arrival_time = ask.arrival_time
        request.cache_salt, request.priority = _salt_and_priority(ask, bound)
        request.session_id = ask.session_id
        request.external_req_id = None
        return request

    def _checked(
        self, ask: Ask, ids: list[int], hold: int | None, bound: Bound | None, key: Any
    ) -> Any:
        """Make it as vLLM does, with all its checks, and remember it."""
        salt, priority = _salt_and_priority(ask, bound)
        params = self._route.sampling_params(ask, len(ids))
        request = self._client.input_processor.process_inputs(
            ask.engine_id,
            self._tokens_input(ids, cache_salt=salt),
            params,
            supported_tasks=self._tasks,
            arrival_time=ask.arrival_time,
            priority=priority,
            session_id=ask.session_id,
        )
        added = {} if bound is None else dict(bound.extra)
        if hold is not None:
            added[HOLD] = hold
        if added:
            made = request.sampling_params
            made.extra_args = {**(made.extra_args or {}), **added}
        if len(self._patterns) >= _PATTERNS:
            self._patterns.clear()
        self._patterns[key] = _Pattern(copy(request))
        return request

    def _with_max_tokens(self, pattern: _Pattern, most: int) -> Any:
        known = pattern.request.sampling_params
        if most < max(1, known.min_tokens):
            raise ValueError("fewer tokens than vLLM allows")  # its own code says it better
        params = copy(known)
        params.max_tokens = most
        if len(pattern.params) < _PATTERNS:
            pattern.params[most] = params
        return params


def _salt_and_priority(ask: Ask, bound: Bound | None) -> tuple[str | None, int]:
    salt = ask.body.cache_salt
    priority = ask.body.priority if ask.priority is None else ask.priority
    if bound is None:
        return salt, priority
    return bound.salted(salt), priority or bound.priority
