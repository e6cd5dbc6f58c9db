"""Real servers: what requests say about their scheduling reaches the engine, and its word them.

The engine refuses what asks for it, and its message says what it knew of the request.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("vllm")

from .conftest import Server
from .telling_scheduler import FULL, LATE, MIDWAY

pytestmark = [pytest.mark.vllm, pytest.mark.server]

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
DEADLINE = {"scalellm_deadline_ms": LATE}

OPTIONS = (
    *("--served-model-name", "demo", "--max-model-len", "1024"),
    *("--scheduler-cls", "telling_scheduler.TellingScheduler"),
)
OURS = ("--plugins", "scalellm,scalellm.sim", *OPTIONS)
TENANTS = [
    {
        "name": "acme",
        "weight": 2,
        "max_running": 3,
        "kv_floor": 0.25,
        "kv_ceiling": 0.5,
        "tokens_per_minute": 1000,
        "priority": 7,
        "ttft_ms": 400,
        "tpot_ms": 40,
        "isolate_prefix": True,
    },
    {"name": "plain"},
]


@dataclass
class Servers:
    """Open to everybody; with a tenants file; with vLLM's own frontend."""

    open: Server
    bound: Server
    upstream: Server


@pytest.fixture(scope="module")
def servers(
    serve_together: Callable[..., list[Server]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    path = tmp_path_factory.mktemp("tenants") / "tenants.json"
    path.write_text(json.dumps([{**entry, "keys": [key_hash(entry)]} for entry in TENANTS]))
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        yield Servers(
            *serve_together(
                stack,
                open=OURS,
                bound=(*OURS, "--scalellm.frontend.tenants", str(path)),
                upstream=(*OURS, "--scalellm.frontend", "off"),
            )
        )


def key_hash(entry: dict[str, Any]) -> str:
    return hashlib.sha256(f"{entry['name']}-key".encode()).hexdigest()


@dataclass
class Got:
    """An answer, as it was on the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error document's content."""
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found

    @property
    def events(self) -> list[str]:
        """Server-sent events, or what of them is data."""
        assert self.headers["content-type"].startswith("text/event-stream")
        return [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]

    @property
    def told(self) -> dict[str, Any]:
        """What the engine knew of a request that it refused."""
        assert self.status == 504, self.body
        found: dict[str, Any] = json.loads(self.error["message"])
        return found


def ask(server: Server, path: str, body: dict[str, Any], **headers: str) -> Got:
    """POST; headers are given with "_" for "-"."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=120)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(
        "POST", path, json.dumps(body).encode(), {"content-type": "application/json", **sent}
    )
    answer = connection.getresponse()
    got = {name.lower(): value for name, value in answer.getheaders()}
    content = answer.read()
    connection.close()
    return Got(answer.status, got, content)


def bodies(path: str, **more: Any) -> dict[str, Any]:
    """A request for one of the routes."""
    messages = [{"role": "user", "content": "Hi"}]
    own: dict[str, dict[str, Any]] = {
        CHAT: {"messages": messages, "max_tokens": 8},
        COMPLETION: {"prompt": "Hi", "max_tokens": 8},
        RESPONSES: {"input": "Hi", "max_output_tokens": 16},
        MESSAGES: {"messages": messages, "max_tokens": 8},
    }
    return {"model": "demo", **own[path], **more}


LANES = [
    pytest.param(path, more, id=f"{path.rpartition('/')[2]}-{lane}")
    for path, lane, more in [
        (CHAT, "fast", {}),
        (CHAT, "full", {"logprobs": True}),
        (CHAT, "several", {"n": 2}),
        (COMPLETION, "fast", {}),
        (COMPLETION, "full", {"logprobs": 1}),
        (COMPLETION, "several", {"prompt": ["Hi", "Hello"]}),
        (RESPONSES, "full", {}),
        (MESSAGES, "full", {}),
    ]
]
STREAMED = [False, True]


def lanes_of(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(server.url + "/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    counts = {"fast": 0.0, "full": 0.0}
    for line in lines:
        for lane in counts:
            if line.startswith("scalellm:requests_total{") and f'lane="{lane}"' in line:
                counts[lane] += float(line.rpartition(" ")[2])
    return counts


def test_the_lanes_are_those_meant(servers: Servers) -> None:
    """Or else every test here is of the full lane."""
    before = lanes_of(servers.open)
    ask(servers.open, CHAT, bodies(CHAT, vllm_xargs={"scalellm_weight": 2}), X_Scalellm_Tenant="a")
    ask(servers.open, CHAT, bodies(CHAT, logprobs=True))
    after = lanes_of(servers.open)
    assert {lane: after[lane] - before[lane] for lane in after} == {"fast": 1, "full": 1}


# To the engine


@pytest.mark.parametrize("stream", STREAMED)
@pytest.mark.parametrize(("path", "more"), LANES)
def test_terms_of_bodies_and_headers_reach_the_engine(
    servers: Servers, path: str, more: dict[str, Any], stream: bool
) -> None:
    said = {**DEADLINE, "scalellm_tenant": "body", "scalellm_weight": 2, "other": 1}
    body = bodies(path, **more, vllm_xargs=said, stream=stream and path != RESPONSES)
    headers = {"X_Scalellm_Tenant": "head", "x_scalellm_tpot_ms": "12.5", "X-Vllm-Priority": "4"}
    got = ask(servers.open, path, body, **headers)
    if path == MESSAGES:
        assert json.loads(got.body)["error"]["type"] == "timeout_error"
    told = got.told
    assert told["extra"].pop("scalellm_hold", 0) in (0, 1), "what the lane itself adds"
    assert told["extra"] == {**said, "scalellm_tenant": "head", "scalellm_tpot_ms": 12.5}
    assert told["priority"] == 4
    assert told["salt"] is None


@pytest.mark.parametrize(("path", "more"), LANES)
def test_terms_of_bodies_reach_the_engine_by_vllms_own_frontend(
    servers: Servers, path: str, more: dict[str, Any]
) -> None:
    said = {**DEADLINE, "scalellm_tenant": "body", "scalellm_ttft_ms": 5}
    got = ask(servers.upstream, path, bodies(path, **more, vllm_xargs=said))
    assert got.told["extra"] == said


@pytest.mark.parametrize(("path", "more"), LANES)
def test_a_tenants_entry_comes_before_what_its_requests_say(
    servers: Servers, path: str, more: dict[str, Any]
) -> None:
    said = {**DEADLINE, "scalellm_tpot_ms": 9}
    body = bodies(path, **more, cache_salt="mine", vllm_xargs=said)
    asked = {"X_Scalellm_Tenant": "other", "x_scalellm_weight": "900"}
    told = ask(servers.bound, path, body, Authorization="Bearer acme-key", **asked).told
    told["extra"].pop("scalellm_hold", None)
    assert told["extra"] == {
        **DEADLINE,
        "scalellm_tenant": "acme",
        "scalellm_weight": 2.0,
        "scalellm_max_running": 3,
        "scalellm_kv_floor": 0.25,
        "scalellm_kv_ceiling": 0.5,
        "scalellm_tokens_per_minute": 1000,
        "scalellm_ttft_ms": 400.0,
        "scalellm_tpot_ms": 9,
    }
    assert told["priority"] == 7
    again = ask(servers.bound, path, body, Authorization="Bearer acme-key").told
    assert again["salt"] == told["salt"] != "mine"
    told = ask(servers.bound, path, body, Authorization="Bearer plain-key").told
    assert (told["priority"], told["salt"]) == (0, "mine")


# Mistakes

WRONG = [
    ("scalellm_weight", -1),
    ("scalellm_weight", 0),
    ("scalellm_weight", "2"),
    ("scalellm_deadline_ms", 0),
    ("scalellm_ttft_ms", float("nan")),
    ("scalellm_tpot_ms", float("inf")),
    ("scalellm_tpot_ms", [1]),
    ("scalellm_tenant", ""),
    ("scalellm_tenant", 3),
    ("scalellm_tenant", "x" * 257),
    ("scalellm_ttl_ms", 5),
    ("scalellm_hold", 0),
    ("scalellm_max_running", 9),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_mistakes_in_bodies_are_refused_alike(servers: Servers, name: str, value: Any) -> None:
    errors = []
    for server in (servers.open, servers.bound, servers.upstream):
        for path, more in [mark.values for mark in LANES]:
            for stream in STREAMED:
                body = bodies(path, **more, vllm_xargs={name: value}, stream=stream)
                got = ask(server, path, body, Authorization="Bearer acme-key")
                assert got.status == 400, (path, more, got.body)
                errors.append(got.error["message"])
                if path != MESSAGES:
                    assert got.error["type"] == "BadRequestError"
                    assert got.error["param"] == f"vllm_xargs.{name}"
                    assert got.error["code"] == 400
    assert len(set(errors)) == 1
    assert f"vllm_xargs.{name}: " in errors[0]
    assert "Valid: " in errors[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Scalellm-Weight", "heavy"),
        ("X-Scalellm-Deadline-Ms", "-5"),
        ("X-Scalellm-TTFT-Ms", "nan"),
        ("X-Scalellm-TPOT-Ms", ""),
        ("X-Scalellm-Tenant", " "),
        ("X-Scalellm-Deadline", "5"),
    ],
)
def test_mistakes_in_headers_are_refused_alike(servers: Servers, name: str, value: str) -> None:
    errors = set()
    for path, more in [mark.values for mark in LANES]:
        for stream in STREAMED:
            got = ask(servers.open, path, bodies(path, **more, stream=stream), **{name: value})
            assert got.status == 400, (path, more, got.body)
            errors.add(got.error["message"])
    (error,) = errors
    assert f"{name}: " in error
    assert "Valid: " in error


def test_a_strangers_mistake_is_that_of_a_stranger(servers: Servers) -> None:
    for more in ({}, {"logprobs": True}):
        body = bodies(CHAT, **more, vllm_xargs={"scalellm_weight": -1})
        assert ask(servers.bound, CHAT, body, X_Scalellm_Weight="x").status == 401


# The engine's word


@pytest.mark.parametrize("stream", STREAMED)
@pytest.mark.parametrize(("path", "more"), [mark for mark in LANES if mark.values[0] != MESSAGES])
def test_a_quota_is_429_and_says_when_to_come_back(
    servers: Servers, path: str, more: dict[str, Any], stream: bool
) -> None:
    body = bodies(path, **more, vllm_xargs={"scalellm_ttft_ms": FULL}, stream=stream)
    got = ask(servers.open, path, body)
    if path == RESPONSES and stream:  # vLLM's first events do not wait for the engine
        assert got.status == 200
        assert json.loads(got.events[-1])["message"] == "The quota is used up."
        return
    assert (got.status, got.headers["retry-after"]) == (429, "7")
    assert got.headers["content-type"] == "application/json"
    assert "x-should-retry" not in got.headers
    assert got.error == {
        "message": "The quota is used up.",
        "type": "Too Many Requests",
        "param": None,
        "code": 429,
    }


@pytest.mark.parametrize(
    ("path", "more"),
    [mark for mark in LANES if mark.values[0] in (CHAT, COMPLETION)],
)
def test_a_stream_that_has_begun_ends_with_an_event(
    servers: Servers, path: str, more: dict[str, Any]
) -> None:
    said = {"scalellm_tpot_ms": MIDWAY}
    body = bodies(path, **more, vllm_xargs=said, stream=True, ignore_eos=True)
    got = ask(servers.open, path, body)
    assert got.status == 200
    *before, error, done = got.events
    assert done == "[DONE]"
    assert any(json.loads(event)["choices"] for event in before), "tokens came before"
    assert json.loads(error) == {
        "error": {
            "message": "The deadline has passed.",
            "type": "Gateway Timeout",
            "param": None,
            "code": 504,
        }
    }


def test_the_official_client_sees_what_it_knows(servers: Servers) -> None:
    openai = pytest.importorskip("openai")
    messages = [{"role": "user", "content": "Hi"}]
    with openai.OpenAI(base_url=f"{servers.open.url}/v1", api_key="none") as client:
        before = lanes_of(servers.open)
        for more in ({}, {"stream": True}, {"logprobs": True}, {"logprobs": True, "stream": True}):
            asked: dict[str, Any] = {"model": "demo", "messages": messages, **more}
            with pytest.raises(openai.InternalServerError) as error:
                client.chat.completions.create(**asked, extra_body={"vllm_xargs": DEADLINE})
            assert error.value.status_code == 504
            full = {"X-Scalellm-TTFT-Ms": str(FULL)}
            with pytest.raises(openai.RateLimitError, match="The quota is used up") as error:
                client.with_options(max_retries=0).chat.completions.create(
                    **asked, extra_headers=full
                )
            assert error.value.response.headers["retry-after"] == "7"
            with pytest.raises(openai.BadRequestError, match="Valid: a number from"):
                client.chat.completions.create(**asked, extra_headers={"X-Scalellm-Weight": "-1"})
        after = lanes_of(servers.open)
        # The client's two retries are not made: what came too late once is not tried again.
        assert sum(after.values()) - sum(before.values()) == 3 * 4
        midway = {"vllm_xargs": {"scalellm_tpot_ms": MIDWAY}, "ignore_eos": True}
        stream = client.chat.completions.create(
            model="demo", messages=messages, stream=True, max_tokens=20, extra_body=midway
        )
        with pytest.raises(openai.APIError, match="The deadline has passed"):
            list(stream)


def test_the_server_goes_on(servers: Servers) -> None:
    """Nothing of the refused is left in the engine, and the next request is served."""
    for server in (servers.open, servers.bound, servers.upstream):
        got = ask(server, CHAT, bodies(CHAT), Authorization="Bearer plain-key")
        assert json.loads(got.body)["choices"]
        with urllib.request.urlopen(server.url + "/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        left = [
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))
        ]
        assert left
        assert not any(left)
