"""Every operation of /openapi.json, by schemathesis: no 5xx, no cut connection, no harm done.

Two servers take turns: one process, and two supervised workers on a simulated GPU (a second model
would take the first one's cores). What is sent, always the same:

- schemathesis' coverage of the schema (boundaries, wrong values, other methods), thinned;
- its examples, valid and not, from Hypothesis without randomness;
- values of these bodies once more, alone in one that is good otherwise, streamed or not. The schema
  allows more than vLLM does, so that whole bodies rarely get past the first checks.

501 is an answer: vLLM says so where this model or server cannot do something. Operations that
could do harm:

- Answers of any length: the server is started with an end to all of them, and to `n`.
- /scale_elastic_ep would stop the engine and start it anew. Its body is not in the schema, so it is
  asked without one, and refuses.
- What stops a server on purpose (/sleep, /collective_rpc, …) is there in development mode only; a
  test holds vLLM to that.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any
from unittest import mock

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis.errors import Unsatisfiable
from hypothesis.internal.cache import LRUCache
from hypothesis.internal.conjecture import providers
from schemathesis.generation import GenerationMode
from schemathesis.generation.drivers import CoverageGenerator
from schemathesis.generation.feedback import NO_FEEDBACK
from schemathesis.generation.overrides import Override

if TYPE_CHECKING:
    from .conftest import Server

pytestmark = pytest.mark.server

# Few tokens for every answer, whatever it asks for, and few answers (VLLM_MAX_N_SEQUENCES).
OPTIONS = (
    *("--scalellm.strict", "--served-model-name", "demo", "--enforce-eager"),
    *("--max-model-len", "256", "--override-generation-config", '{"max_new_tokens": 3}'),
)
ONE = ("--plugins", "scalellm")
WORKERS = ("--plugins", "scalellm,scalellm.sim", "--scalellm.frontend.workers", "2")
MAX_N = "2"

PATIENCE_S = 120.0
"""For one answer, on a machine with other work."""

COVERAGE = 2500
"""Cases of an operation's coverage that are looked at: /v1/responses has 14,000, in 10 s."""

WHOLE, ALONE = 120, 200
"""How many of an operation's bodies, and of its values alone, are sent at most."""

EXAMPLES = 10
"""Examples of each kind, valid and not; the first few of an operation take seconds."""

NO_EXAMPLES = {"/v1/chat/completions/batch"}
"""Half a minute for these, whose fields are those of /v1/chat/completions."""

HARMFUL = {"/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/pause", "/resume"}
"""In development mode only."""

_TALK = [{"role": "user", "content": "hi"}]
_CHAT = {"model": "demo", "messages": _TALK}
GOOD: dict[str, dict[str, Any]] = {
    "/detokenize": {"model": "demo", "tokens": [1, 2]},
    "/generative_scoring": {"model": "demo", "query": "a", "items": ["b"], "label_token_ids": [1]},
    "/tokenize": _CHAT,
    "/v1/chat/completions": _CHAT,
    "/v1/chat/completions/batch": {"model": "demo", "messages": [_TALK, _TALK]},
    "/v1/completions": {"model": "demo", "prompt": "hi"},
    "/v1/messages": {**_CHAT, "max_tokens": 4},
    "/v1/messages/count_tokens": _CHAT,
    "/v1/responses": {"model": "demo", "input": "hi"},
}

STREAMED = {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"}

ALSO = {"/v1/chat/completions": "/invocations"}
"""SageMaker's one route takes these bodies, and its schema says nothing of it."""


def _spread(values: list[Any], most: int) -> list[Any]:
    step = -(-len(values) // most)
    return values[:: max(1, step)]


def coverage(schema: Any, operation: Any) -> list[Any]:
    """Return the cases of schemathesis' coverage phase."""
    settings = schema.config.generation_for(operation=operation, phase="coverage")
    made = CoverageGenerator(
        operation=operation,
        generation_modes=settings.modes,
        generation_config=settings,
        auth_storage=None,
        override=Override(query={}, headers={}, cookies={}, path_parameters={}),
        feedback=NO_FEEDBACK,
    )
    return list(islice(made, COVERAGE))


def examples(operation: Any, mode: GenerationMode) -> list[Any]:
    """Return examples that are the same in every run."""
    found: list[Any] = []

    @hypothesis.settings(
        derandomize=True,
        database=None,
        max_examples=EXAMPLES,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def collect(case: Any) -> None:
        found.append(case)

    # Else constants of whichever modules are imported are among the values.
    alike = {"_get_local_constants": providers.Constants, "CONSTANTS_CACHE": LRUCache(1024)}
    with mock.patch.multiple(providers, **alike), suppress(Unsatisfiable):
        collect()
    return found


def alone(path: str, cases: list[Any]) -> list[dict[str, Any]]:
    """Return bodies that are good but for one value, for every value in the cases' bodies."""
    bodies = {}
    for case in cases:
        for key, value in case.body.items() if isinstance(case.body, dict) else ():
            bodies[repr((key, value))] = {**GOOD[path], str(key): value}
    return list(bodies.values())


def requests_of(schema: Any, operation: Any) -> Iterator[dict[str, Any]]:
    """Yield what is sent to an operation, as arguments of `requests.request`."""
    path = operation.path
    covered = coverage(schema, operation)
    drawn = [] if path in NO_EXAMPLES else [examples(operation, mode) for mode in GenerationMode]
    tried = [case for found in drawn for case in found]
    for case in [*_spread(covered, WHOLE), *tried]:
        yield case.as_transport_kwargs(base_url="")
    if path not in GOOD:
        return
    for number, body in enumerate(_spread(alone(path, covered), ALONE) + alone(path, tried)):
        if path in STREAMED and number & 2:
            body.setdefault("stream", True)
        with suppress(TypeError, ValueError):  # not JSON, which schemathesis tries, too
            data = json.dumps(body).encode()
            for url in filter(None, (path, ALSO.get(path))):
                headers = {"content-type": "application/json"}
                yield {"method": "POST", "url": url, "data": data, "headers": headers}


def complaint(asked: dict[str, Any]) -> str | None:
    """Send a request on a connection of its own; return what is wrong with the answer."""
    try:
        answer = requests.request(**{**asked, "timeout": PATIENCE_S})
    except requests.RequestException as error:
        return f"{type(error).__name__}: {error}"
    if answer.status_code >= 500 and answer.status_code != 501:
        return f"{answer.status_code} {answer.text[:500]}"
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        for line in answer.text.split("\n"):
            # What vLLM would have answered with 500, had the status not been out.
            if line.startswith("data: {") and _is_our_fault(json.loads(line[6:])):
                return f"in a stream: {line[:500]}"
    return None


def _is_our_fault(event: dict[str, Any]) -> bool:
    error = event.get("error") or {}
    return error.get("code") == 500 or "InternalServerError" in (
        error.get("type"),
        event.get("code"),
    )


@dataclass
class Campaign:
    """What was found by sending everything."""

    one: Server
    workers: Server
    before: dict[str, dict[int, str]] = field(default_factory=dict)
    paths: set[str] = field(default_factory=set)
    sent: int = 0
    found: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Send everything; four requests at a time, while the next are made."""
        for server in (self.one, self.workers):
            self.before[server.url] = server.processes()
        schema = schemathesis.openapi.from_dict(self.one.get("/openapi.json"))
        turns = cycle((self.one.url, self.workers.url))
        room = threading.Semaphore(64)  # requests made and not yet answered
        with ThreadPoolExecutor(4) as pool:
            for result in schema.get_all_operations():
                operation = result.ok()
                self.paths.add(operation.path)
                for asked in requests_of(schema, operation):
                    room.acquire()
                    url = next(turns) + asked["url"]
                    job = pool.submit(complaint, {**asked, "url": url})
                    job.add_done_callback(self._noted(operation.label, asked, room))

    def _noted(
        self, label: str, asked: dict[str, Any], room: threading.Semaphore
    ) -> Callable[[Future[str | None]], None]:
        def note(job: Future[str | None]) -> None:
            room.release()
            self.sent += 1
            wrong = job.exception() or job.result()
            if wrong is not None:
                body = asked.get("data", asked.get("json"))
                self.found.append(f"{label} {asked['url']}: {wrong}\n    {str(body)[:2000]}")

        return note


@pytest.fixture(scope="module")
def campaign(serve_together: Callable[..., list[Server]]) -> Iterator[Campaign]:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("VLLM_MAX_N_SEQUENCES", MAX_N)
        one, workers = serve_together(stack, one=(*OPTIONS, *ONE), workers=(*OPTIONS, *WORKERS))
        made = Campaign(one, workers)
        made.run()
        yield made


def test_no_request_gets_a_500_or_no_answer(campaign: Campaign) -> None:
    assert campaign.sent > 3000
    assert not campaign.found, f"{len(campaign.found)} findings\n" + "\n".join(campaign.found[:20])


def test_what_stops_a_server_is_for_development_only(campaign: Campaign) -> None:
    assert {"/v1/chat/completions", "/scale_elastic_ep"} <= campaign.paths
    assert not HARMFUL & campaign.paths


def _values(server: Server, name: str, labels: str = "") -> list[float]:
    with requests.get(f"{server.url}/metrics", timeout=PATIENCE_S) as answer:
        found = re.findall(rf"^{name}{{[^}}]*{labels}[^}}]*}} (\S+)$", answer.text, re.MULTILINE)
    return [float(value) for value in found]


@pytest.mark.parametrize("name", ["one", "workers"])
def test_the_server_is_as_before(campaign: Campaign, name: str) -> None:
    """No process was replaced, nothing is open, and the lane has met nothing unforeseen."""
    server: Server = getattr(campaign, name)
    assert server.processes() == campaign.before[server.url]
    answer = server.post("/v1/chat/completions", {**_CHAT, "max_tokens": 2})
    assert answer["usage"]["completion_tokens"] > 0
    deadline = time.monotonic() + PATIENCE_S
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    while any(sum(_values(server, gauge)) for gauge in gauges):
        assert time.monotonic() < deadline, "requests are left in the engine"
        time.sleep(0.1)  # polling another process: there is nothing to wait on
    for lane in ("fast", "full"):
        assert sum(_values(server, "scalellm:requests_total", f'lane="{lane}"')) > 20
    assert "the fast lane failed" not in server.log.read_text()
