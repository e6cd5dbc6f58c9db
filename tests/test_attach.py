"""What is put around vLLM's objects when an API server is built."""

from __future__ import annotations

import gc
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from scalellm_plugins.frontends import attach, requests  # after importorskip
from scalellm_plugins.frontends.lane import Lane
from scalellm_plugins.frontends.request_log import RequestLog

pytestmark = pytest.mark.vllm


def test_clients_cannot_speak_to_the_engines_side() -> None:
    """Else anybody could have the engine keep its tokens. Terms may be said; where keys are
    checked, the tenant's entry is put in their place (test_terms_server.py)."""
    made = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None))

    def process_inputs(_request_id: str, _prompt: Any, params: Any) -> Any:
        made.sampling_params.extra_args = params
        return made

    processor = SimpleNamespace(process_inputs=process_inputs)
    requests.reserve_names(processor)
    said = {"scalellm_tenant": "t", "scalellm_deadline_ms": 5, "mine": 1}
    processor.process_inputs("id", None, {"scalellm_kept": "x", "scalellm_kv_floor": 1, **said})
    assert made.sampling_params.extra_args == said
    processor.process_inputs("id", None, {"scalellm_hold": 0})
    assert made.sampling_params.extra_args is None
    processor.process_inputs("id", None, None)
    assert made.sampling_params.extra_args is None


def server(**config: Any) -> tuple[Any, Any, Any]:
    """A client, a state and arguments of a server with no obstacle but those given."""
    known = {
        "observability_config": SimpleNamespace(otlp_traces_endpoint=None),
        "parallel_config": SimpleNamespace(),
        "kv_transfer_config": None,
    }
    client = SimpleNamespace(
        vllm_config=SimpleNamespace(**known | config),
        model_config=SimpleNamespace(skip_tokenizer_init=False),
    )
    args = SimpleNamespace(
        middleware=[], enable_log_requests=False, return_tokens_as_token_ids=False
    )
    return client, SimpleNamespace(openai_serving_completion=None), args


def test_what_the_lane_would_leave_out_keeps_it_out() -> None:
    assert attach.obstacles(*server()) == []
    client, state, args = server(kv_transfer_config=object())
    args.middleware = ["package.function"]
    reasons = attach.obstacles(client, state, args)
    assert [reason.split()[0] for reason in reasons] == ["--middleware", "--kv-transfer-config"]
    tracing = SimpleNamespace(
        otlp_traces_endpoint="http://x", per_request_spec_decode_metrics="all"
    )
    assert len(attach.obstacles(*server(observability_config=tracing))) == 2
    client, _, args = server()
    assert attach.obstacles(client, SimpleNamespace(), args) == ["the model does not generate text"]


def test_a_refusal_by_vllms_limits_is_counted_by_vllm_alone() -> None:
    counted: list[str] = []

    class Client:
        def _record_admission_rejection(self, reason: str) -> None:
            counted.append(reason)

        def check_admission(self, request_id: str) -> None:
            self._record_admission_rejection(request_id)
            raise ValueError("full")

    maker = requests.RequestMaker.__new__(requests.RequestMaker)
    maker._client = client = Client()
    with pytest.raises(ValueError, match="full"):
        maker._check_admission("ours")
    assert counted == []
    with pytest.raises(ValueError, match="full"):
        client.check_admission("vllm's own")
    assert counted == ["vllm's own"]


def test_catching_up_counts_what_waits() -> None:
    done: list[str] = []
    lane = Lane.__new__(Lane)
    lane._ended = []
    lane.settle = lambda: done.append("exchanges")  # type: ignore[method-assign]
    lane.link = None
    lane.catch_up()
    lane.link = SimpleNamespace(book=SimpleNamespace(flush=lambda: done.append("statistics")))
    lane.catch_up()
    assert done == ["exchanges", "exchanges", "statistics"]


@pytest.mark.parametrize("kind", ["text", "json"])
def test_the_access_log_says_id_and_stages(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "client": ("9.9.9.9", 1),
    }
    logger = logging.getLogger("test.access")
    with caplog.at_level(logging.INFO, logger.name):
        RequestLog(logger, kind).ended(
            scope, 200, 0.25, request_id="cmpl-1", stages={"prefill": 0.1}, tokens=(3, 4)
        )
    (line,) = caplog.messages
    pairs = (part.split("=", 1) for part in line.split())
    said = json.loads(line) if kind == "json" else dict(pairs)
    assert {name: str(said[name]) for name in ("request_id", "status", "ms", "prefill_ms")} == {
        "request_id": "cmpl-1",
        "status": "200",
        "ms": "250.0",
        "prefill_ms": "100.0",
    }
    assert (str(said["prompt_tokens"]), str(said["completion_tokens"])) == ("3", "4")


@pytest.mark.parametrize(
    ("before", "after"), [((700, 10, 10), (20_000, 10, 10)), ((5000, 5, 5), (5000, 5, 5))]
)
def test_collections_are_rare_unless_somebody_chose(
    before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    python = gc.get_threshold()
    try:
        gc.set_threshold(*before)
        attach.collect_rarely()
        assert gc.get_threshold() == after
    finally:
        gc.set_threshold(*python)
