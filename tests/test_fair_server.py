"""A real server that shares fairly: who floods it does not make the others wait."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.server]

DEMO = Path(__file__).parents[1] / "examples" / "demo_model"
SEATS, FLOOD, TOKENS = 4, 40, 60


def test_a_tenant_that_floods_waits_for_itself(serve: Any, tmp_path: Path) -> None:
    """The other's request is next when a seat is free, however many were there before it."""
    tenants = tmp_path / "tenants.yaml"
    entries = [
        {"name": name, "keys": [hashlib.sha256(f"{name}-key".encode()).hexdigest()]}
        for name in ("flood", "other")
    ]
    tenants.write_text(json.dumps(entries))
    server = serve(
        DEMO,
        *("--plugins", "scalellm,scalellm.sim", "--served-model-name", "demo"),
        *("--max-num-seqs", str(SEATS), "--scalellm.scheduler.policy", "fair"),
        *("--scalellm.frontend.tenants", str(tenants), "--scalellm.strict"),
    )
    done: list[str] = []
    admitted = threading.Semaphore(0)

    def ask(tenant: str) -> None:
        body = {"model": "demo", "prompt": "Hi", "max_tokens": TOKENS, "ignore_eos": True}
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json", "authorization": f"Bearer {tenant}-key"},
        )
        admitted.release()
        with urllib.request.urlopen(request, timeout=120) as response:
            assert json.load(response)["usage"]["completion_tokens"] == TOKENS
        done.append(tenant)

    with ThreadPoolExecutor(FLOOD + 1) as threads:
        jobs = [threads.submit(ask, "flood") for _ in range(FLOOD)]
        for _ in range(FLOOD):
            assert admitted.acquire(timeout=60)
        jobs[0].result(timeout=60)  # the engine has all of them
        jobs.append(threads.submit(ask, "other"))
        for job in jobs:
            job.result(timeout=120)
    behind = FLOOD + 1 - done.index("other")
    assert behind > FLOOD // 2, f"{done.index('other')} answers of the flood came first"
