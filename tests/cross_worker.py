"""Asking a particular worker of a server, and reading what it says."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIMIT_S = 120.0
WORKERS = 3


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for something that another process does."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


def serving(server: Any) -> int:
    """How many workers have come up so far."""
    return int(server.log.read_text().count("Application startup complete"))


def workers(server: Any) -> dict[int, int]:
    """Slot → process id."""
    titles = server.processes().items()
    return {int(t.rpartition("_")[2]): pid for pid, t in titles if t.startswith("VLLM::APIServer_")}


class Client:
    """One connection, kept open, to one worker."""

    def __init__(self, server: Any) -> None:
        host, _, port = server.url.removeprefix("http://").partition(":")
        self._server_port = int(port)
        self.connection = http.client.HTTPConnection(host, int(port), timeout=LIMIT_S)
        self.get("/version")
        self.pid = self._owner(set(workers(server).values()) or {server.pid})

    def _owner(self, pids: set[int]) -> int:
        """The process that holds the other end, found in /proc."""
        ours = f"{self.connection.sock.getsockname()[1]:04X}"
        theirs = f"{self._server_port:04X}"
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(f":{theirs}") and fields[2].endswith(f":{ours}"):
                inode = f"socket:[{fields[9]}]"
        for pid in pids:
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    if os.readlink(entry) == inode:
                        return pid
                except OSError:  # closed while we looked
                    continue
        raise AssertionError(f"no worker holds {inode}")

    def start(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        """Send a request; return the response, unread."""
        text = None if body is None else json.dumps(body)
        self.connection.request(method, path, text, {"content-type": "application/json"})
        return self.connection.getresponse()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Return status and text."""
        response = self.start(method, path, body)
        return response.status, response.read().decode()

    def get(self, path: str) -> Any:
        """GET a text or JSON document."""
        status, text = self.ask("GET", path)
        assert status == 200, (path, status, text)
        return json.loads(text) if text.startswith(("{", "[")) else text

    def post(self, path: str, body: Any) -> Any:
        """POST and return the JSON answer."""
        status, text = self.ask("POST", path, body)
        assert status == 200, (path, status, text)
        return json.loads(text) if text.startswith("{") else text


@contextmanager
def connected(server: Any) -> Iterator[list[Client]]:
    until(lambda: len(workers(server)) == WORKERS, "every slot has a worker")
    opened: list[Client] = []
    by_pid: dict[int, Client] = {}
    slots = workers(server)
    try:
        while set(by_pid) != set(slots.values()):
            assert len(opened) < 200, "connections do not reach every worker"
            opened.append(Client(server))
            by_pid.setdefault(opened[-1].pid, opened[-1])
        yield [by_pid[pid] for _, pid in sorted(slots.items())]
    finally:
        for client in opened:
            client.connection.close()


def completion(tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "Hello", "max_tokens": tokens, "ignore_eos": True, **more}


def samples(text: str) -> dict[str, float]:
    """`name{labels}` → value; fails on a sample that is there twice."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert name not in found, f"{name} is there twice"
            found[name] = float(value)
    return found


def one(text: str, name: str) -> float:
    """The value of the only sample with this name."""
    ((_, value),) = [
        (key, value) for key, value in samples(text).items() if key.partition("{")[0] == name
    ]
    return value


def names(client: Client) -> list[str]:
    """The models and adapters that a worker lists."""
    return [model["id"] for model in client.get("/v1/models")["data"]]


def response(**more: Any) -> dict[str, Any]:
    """A request of the Responses API."""
    return {"model": "demo", "input": "Hello", "max_output_tokens": 8, **more}
