"""Admission in a real server: two workers, both lanes, tenants. One server for all tests.

And what it is to end requests early, in the same server: its steps take 21 ms.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[1]
LIMIT_S = 120.0
MOST = 5
"""Requests in flight that the server takes; the tenant "small" may have 2 of them."""

CHAT = "/v1/chat/completions"
SLOW = {"max_tokens": 150, "ignore_eos": True}
"""3 s at 21 ms per token: all of a burst has arrived long before the first is answered."""

FULL_LANE = {"logprobs": True}
"""Fast requests become slow ones that only vLLM's own code serves."""

PROBE = '''
import json, multiprocessing, os

def register():
    """In the engine: note every request's extra arguments, and its tokens if it is ended."""
    if not multiprocessing.current_process().name.startswith("EngineCore"):
        return
    from vllm.v1.core.sched.scheduler import Scheduler
    if hasattr(Scheduler, "probed"):
        return
    original = Scheduler.add_request
    def add_request(self, request):
        with open(os.environ["PROBE_EXTRA"], "a") as file:
            file.write(json.dumps(request.sampling_params.extra_args) + "\\n")
        return original(self, request)
    finish = Scheduler.finish_requests
    def finish_requests(self, request_ids, status):
        ended = finish(self, request_ids, status)
        with open(os.environ["PROBE_EXTRA"] + ".ended", "a") as file:
            file.writelines(f"{request.num_output_tokens}\\n" for request in ended)
        return ended
    Scheduler.add_request, Scheduler.finish_requests = add_request, finish_requests
    Scheduler.probed = True

class Realtime:
    """The route that vLLM has with models of speech; a session lasts as long as its client."""

    name = "probe_extra"
    required_tasks = None

    def attach_router(self, app):
        from fastapi import WebSocket

        @app.websocket("/v1/realtime")
        async def realtime(socket: WebSocket):
            await socket.accept()
            await socket.receive()

    async def init_state(self, engine_client, state, args):
        pass

def endpoint():
    return Realtime()
'''


class Reply(NamedTuple):
    """Of one request."""

    status: int
    headers: dict[str, str]
    text: str

    @classmethod
    def of(cls, status: int, response: Any) -> Reply:
        headers = {name.lower(): value for name, value in response.headers.items()}
        return cls(status, headers, response.read().decode())

    @property
    def message(self) -> str:
        return str(json.loads(self.text)["error"]["message"])


def tenants(**small: Any) -> str:
    """The file: "small" with 2 requests at a time (unless told otherwise), "large" with any."""
    entries = [{"name": "small", "max_requests": 2, **small}, {"name": "large"}]
    for entry in entries:
        entry["keys"] = [hashlib.sha256(f"{entry['name']}-key".encode()).hexdigest()]
    return json.dumps(entries)


class Served:
    """The server, and what belongs to it."""

    def __init__(self, server: Any, folder: Path) -> None:
        self.server = server
        self.file = folder / "tenants.json"
        self.extra = folder / "extra"
        self.ended = folder / "extra.ended"

    def ask(self, key: str | None = "large-key", path: str = CHAT, **body: Any) -> Reply:
        if path == CHAT:
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **body}
        request = urllib.request.Request(
            self.server.url + path,
            json.dumps({"model": "demo", **body}).encode() if body or path == CHAT else None,
            {"content-type": "application/json"},
        )
        if key is not None:
            request.add_header("authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
                return Reply.of(response.status, response)
        except urllib.error.HTTPError as error:
            return Reply.of(error.code, error)

    def burst(self, count: int, key: str = "large-key", *kinds: dict[str, Any]) -> list[Reply]:
        """Many at once, alternating between `kinds` of bodies, each on its own connection."""
        with ThreadPoolExecutor(count) as threads:
            jobs = [
                threads.submit(self.ask, key, **SLOW, **kinds[n % len(kinds)]) for n in range(count)
            ]
            return [job.result() for job in jobs]

    def used(self, gauge: str, tenant: str) -> float:
        text = self.ask(None, "/metrics").text
        pattern = rf'^scalellm:admission_{gauge}{{[^}}]*tenant="{tenant}"[^}}]*}} (\S+)$'
        return float(max(re.findall(pattern, text, re.M), default="-1"))

    def generated(self) -> float:
        """Tokens so far, of all requests."""
        text = self.ask(None, "/metrics").text
        found = re.findall(r"^vllm:generation_tokens_total{.*} (\S+)$", text, re.M)
        return sum(map(float, found))

    def workers(self) -> set[int]:
        titles = self.server.processes().items()
        return {pid for pid, title in titles if title.startswith("VLLM::APIServer_")}


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    folder = tmp_path_factory.mktemp("overload")
    info = folder / "site" / "probe_extra-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: probe_extra\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nprobe_extra = probe_extra_module:register\n"
        "[vllm.endpoint_plugins]\nprobe_extra = probe_extra_module:endpoint\n"
    )
    (folder / "site" / "probe_extra_module.py").write_text(PROBE)
    (folder / "tenants.json").write_text(tenants())
    options = (
        *("--plugins", "scalellm,scalellm.sim,probe_extra", "--scalellm.strict"),
        *("--scalellm.sim.speed", "0.25", "--scalellm.frontend.workers", "2"),
        *("--scalellm.frontend.tenants", str(folder / "tenants.json")),
        *("--scalellm.frontend.max_requests", str(MOST), "--api-key", "own-key"),
        *("--served-model-name", "demo", "--max-model-len", "2048"),
    )
    environment = {"PYTHONPATH": str(folder / "site"), "PROBE_EXTRA": str(folder / "extra")}
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # routes that abort and pause
    with ExitStack() as stack:
        server = conftest._start(
            stack, folder / "server.log", ROOT / "examples" / "demo_model", *options, **environment
        )
        made = Served(server, folder)
        up = "Application startup complete"
        until(lambda: server.log.read_text().count(up) == 2, "both workers are up")
        yield made
    assert "Traceback" not in server.log.read_text().partition("[shutdown]")[0]


def test_exactly_as_many_as_the_limit_over_workers_and_lanes(served: Served) -> None:
    for kinds in ([{}], [FULL_LANE], [{}, FULL_LANE, {"n": 2}, {"stream": True}]):
        replies = served.burst(6 * MOST, "large-key", *kinds)
        statuses = sorted(reply.status for reply in replies)
        assert statuses == [200] * MOST + [503] * 5 * MOST
    refused = next(reply for reply in replies if reply.status == 503)
    assert f"{MOST} (--scalellm.frontend.max_requests)" in refused.message
    assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_a_tenants_limit_is_its_own(served: Served) -> None:
    with ThreadPoolExecutor(2) as threads:
        small = threads.submit(served.burst, 8, "small-key", {}, FULL_LANE)
        large = threads.submit(served.burst, 3, "large-key", {}, FULL_LANE)
        statuses = sorted(reply.status for reply in small.result())
        assert [reply.status for reply in large.result()] == [200] * 3
    assert statuses == [200] * 2 + [429] * 6
    (text,) = {
        reply.message.partition("Retry")[0] for reply in small.result() if reply.status > 200
    }
    assert "'small'" in text
    assert "its limit is 2 (max_requests in the tenants file)" in text


def test_keys(served: Served) -> None:
    for key in ("small-key", "large-key", "own-key"):
        assert served.ask(key).status == 200, key
        assert served.ask(key, **FULL_LANE).status == 200, key
        assert served.ask(key, "/v1/models").status == 200, key
    for wrong in (None, "small", "small-key "):
        for reply in (served.ask(wrong), served.ask(wrong, "/v1/models")):
            assert (reply.status, reply.text) == (401, '{"error":"Unauthorized"}')
    assert served.ask(None, "/health").status == 200


def test_websockets_are_requests_in_flight_over_all_workers(served: Served) -> None:
    pytest.importorskip("websockets")
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    def status(key: str) -> int:
        """Of the handshake; the session goes on until the end of the test."""
        address = served.server.url.replace("http", "ws") + "/v1/realtime"
        headers = {"Authorization": f"Bearer {key}"}
        try:
            stack.enter_context(connect(address, additional_headers=headers, proxy=None))
        except InvalidStatus as refused:
            return refused.response.status_code
        return 101

    with ExitStack() as stack:
        assert status("wrong-key") == 401
        assert [status("small-key") for _ in range(4)] == [101, 101, 429, 429]
        assert [status("large-key") for _ in range(5)] == [101] * (MOST - 2) + [503] * 2
        assert served.ask("large-key").status == 503
        assert served.used("queued_requests", "large") == 0
    until(lambda: served.ask("small-key").status == 200, "the sessions have ended")


def test_the_engine_knows_the_tenant_whatever_a_client_says(served: Served) -> None:
    for more in ({}, FULL_LANE, {"n": 2}):
        seen = len(served.extra.read_text().splitlines())
        for key, name in (("small-key", "small"), ("own-key", "default")):
            liar = {"vllm_xargs": {"scalellm_tenant": "large", "theirs": 1}}
            assert served.ask(key, **more, **liar).status == 200
            lines = served.extra.read_text().splitlines()[seen:]
            seen += len(lines)
            assert len(lines) == more.get("n", 1)
            for line in lines:
                assert json.loads(line)["scalellm_tenant"] == name
                assert json.loads(line)["theirs"] == 1


def test_prompts_that_do_not_fit_are_refused_in_both_lanes_before_a_stream_begins(
    served: Served,
) -> None:
    # Room for requests that were refused and, on a busy machine, are not given back yet.
    served.file.write_text(tenants(max_prompt_tokens=400, max_requests=MOST))
    long = {"prompt": [5] * 300, "path": "/v1/completions", **SLOW}
    try:
        until(lambda: _refused(served, long), "the file is read again")
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(served.ask, "small-key", **long)
            until(lambda: served.used("prompt_tokens", "small") == 300, "the first is counted")
            for more in ({}, {"stream": True}, {"logprobs": 1}, {"logprobs": 1, "stream": True}):
                reply = served.ask("small-key", **{**long, **more})
                assert reply.status == 429, more
                assert "300 prompt tokens in flight, this request brings 300" in reply.message
                assert "retry-after" in reply.headers
            assert first.result().status == 200
        # Alone it may be as long as the model allows.
        assert served.ask("small-key", **{**long, "prompt": [5] * 500}).status == 200
        until(lambda: served.used("prompt_tokens", "small") == 0, "all of it is given back")
        assert served.used("requests", "small") == 0
    finally:
        served.file.write_text(tenants())


@pytest.mark.parametrize("how", ["abort", "pause"])
@pytest.mark.parametrize("body", [{}, {"stream": True, "stream_interval": 16}])
def test_what_is_ended_early_has_every_token_of_the_engine(
    served: Served, how: str, body: dict[str, Any]
) -> None:
    """As with vLLM's own frontend, although the engine keeps them; from whichever worker."""
    if body:
        body = {**body, "stream_options": {"include_usage": True}}
    body = {**SLOW, "max_tokens": 1500, "request_id": "early", **body}
    before = len(served.ended.read_text().split()) if served.ended.exists() else 0
    tokens = served.generated()
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(served.ask, "large-key", **body)
        # Half a second's tokens of a request before this one may have been counted since then.
        until(lambda: served.generated() > tokens + 40, "it runs")
        if how == "abort":  # the worker that has it is not known
            path, ids = "/abort_requests", {"request_ids": ["chatcmpl-early"]}
            until(lambda: served.ask(None, path, **ids) and job.done(), "it is aborted")
        else:
            assert served.ask(None, "/pause?mode=abort", _=0).status == 200
            assert served.ask(None, "/resume", _=0).status == 200
        reply = job.result()
    (generated,) = served.ended.read_text().split()[before:]
    events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if "usage" in line]
    said = json.loads(events[-1] if "stream" in body else reply.text)
    assert '"finish_reason":"abort"' in reply.text
    assert said["usage"]["completion_tokens"] == int(generated) > 10


def _refused(served: Served, long: dict[str, Any]) -> bool:
    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(served.ask, "small-key", **long) for _ in range(2)]
        return sorted(job.result().status for job in jobs) == [200, 429]


def test_a_dead_workers_requests_are_forgotten_and_no_others(served: Served) -> None:
    with ThreadPoolExecutor(MOST) as threads:
        jobs = [
            threads.submit(served.ask, "large-key", **{**SLOW, "max_tokens": 1800})
            for _ in range(MOST)
        ]
        until(lambda: served.used("requests", "large") == MOST, "all are in")
        before = served.workers()
        os.kill(min(before), signal.SIGKILL)
        until(lambda: len(served.workers() - before) == 1, "it is replaced")
        failed = sum(job.done() and job.exception() is not None for job in jobs)
        assert 0 < failed < MOST, "connections are spread over both workers"
        until(lambda: served.used("requests", "large") == MOST - failed, "its own are forgotten")
        # And so there is room for as many, and no more.
        replies = served.burst(2 * MOST, "large-key", {})
        assert sorted(reply.status for reply in replies) == [200] * failed + [503] * (
            2 * MOST - failed
        )
        assert sum(job.exception() is None and job.result().status == 200 for job in jobs) == (
            MOST - failed
        )
