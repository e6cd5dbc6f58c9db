"""What the engine refuses in the fast lane: a status while there is time, an event later."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("vllm")

from scalellm_plugins.frontends.engine_refusals import HEADERS_S, LONGEST_HEADERS_S
from scalellm_plugins.frontends.limits import error_body
from scalellm_plugins.scheduling.refused import Refused

from .lane_parts import CHAT, COMPLETION, Bench, bench, events, output

pytestmark = pytest.mark.vllm

WORD = 262
BOTH = pytest.mark.parametrize("path", [CHAT, COMPLETION])
KINDS = pytest.mark.parametrize("stream", [True, False])
LATE = Refused(504, "The deadline has passed.")
FULL = Refused(429, "The quota is used up.", retry_after_s=7)


@pytest.fixture
def lane() -> Bench:
    """A lane without requests."""
    made = bench()
    made.fresh()
    return made


@BOTH
@KINDS
@pytest.mark.parametrize("refused", [LATE, FULL])
def test_a_refusal_of_the_engine_has_its_status(
    lane: Bench, path: str, stream: bool, refused: Refused
) -> None:
    """While the headers are still here, which is as long as there was nothing to send."""
    peer = lane.take(path, stream=stream)
    lane.step([output(peer, [], "ERROR", stop_reason=refused.reason())])
    status, headers, body = peer.response()
    assert (status, headers["content-type"]) == (refused.status, "application/json")
    assert body == error_body(refused.status, refused.message)
    late = refused is LATE
    assert headers.get("x-should-retry") == ("false" if late else None)
    assert headers.get("retry-after") == (None if late else "7")
    assert lane.idle()


@BOTH
@pytest.mark.parametrize("tokens", [0, 1])
def test_a_refusal_after_the_headers_is_an_event(lane: Bench, path: str, tokens: int) -> None:
    peer = lane.take(path, stream=True)
    for _, send_headers in list(lane.timers.calls):
        send_headers()
    assert peer.wire.data.endswith(b"\r\n\r\n")
    if tokens:
        lane.step([output(peer, [WORD], first=True)])
    lane.step([output(peer, [], "ERROR", stop_reason=LATE.reason())])
    status, _, body = peer.response()
    *before, error, done = events(body)
    assert (status, done, bool(before)) == (200, "[DONE]", bool(tokens))
    assert json.loads(error)["error"]["message"] == LATE.message
    assert json.loads(error)["error"]["code"] == 504
    assert lane.idle()


@pytest.mark.parametrize(
    ("said", "wait_s"),
    [
        ({}, HEADERS_S),
        ({"scalellm_tpot_ms": 9000}, HEADERS_S),
        ({"scalellm_ttft_ms": 2000}, 2.5),
        ({"scalellm_ttft_ms": 2000, "scalellm_deadline_ms": 9000}, 9.5),
        ({"scalellm_deadline_ms": 10**7}, LONGEST_HEADERS_S),
    ],
)
def test_headers_wait_for_a_refusal_until_a_deadline(
    lane: Bench, said: dict[str, Any], wait_s: float
) -> None:
    peer = lane.take(stream=True, vllm_xargs=said)
    ((waited, send_headers),) = lane.timers.calls
    assert waited == wait_s
    lane.step([output(peer, [WORD], first=True)])
    written = peer.wire.data
    assert written.startswith(b"HTTP/1.1 200 OK"), "they do not wait longer than for a token"
    send_headers()
    assert peer.wire.data == written
    lane.step([output(peer, [WORD], "LENGTH")])
    assert peer.response()[0] == 200


def test_a_client_that_leaves_before_its_headers_is_sent_nothing(lane: Bench) -> None:
    peer = lane.take(stream=True)
    ((_, send_headers),) = lane.timers.calls
    peer.cycle.disconnected = True
    peer.answer.gone()
    send_headers()
    assert peer.wire.data == b""
