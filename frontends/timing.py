"""Where a request's time goes: stages of the fast lane and of the engine, measured on one clock.

The engine's timestamps and ours are both CLOCK_MONOTONIC of one machine (`time.monotonic`), so
stages can be told apart across the processes:

- tokenize: from the complete request to its token ids (decoding, rendering, tokenizing);
- to_engine: from there until the engine has queued it (checks, encoding, the way);
- engine_queue: until it is scheduled for the first time;
- prefill: until its first token;
- decode: until its last token;
- write: from the engine's last output to the last byte handed to the connection.

The gateway's share is what is not the engine's: tokenize, to_engine and write, of the whole.
"""

from __future__ import annotations

import time
from typing import Any

import prometheus_client

from .metric import metric

STAGES = ("tokenize", "to_engine", "engine_queue", "prefill", "decode", "write")
_ENGINE = ("engine_queue", "prefill", "decode")
_HEADER = b"server-timing: %b, total;dur=%%.2f\r\n" % b", ".join(
    b"%b;dur=%%.2f" % stage.encode() for stage in STAGES
)
_BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 25, 50, 100),
)


class Clock:
    """The moments of one request, in seconds of `time.monotonic`; 0 where it did not get to."""

    __slots__ = ("arrived", "done", "tokenized")

    def __init__(self) -> None:
        self.arrived = time.monotonic()
        self.tokenized = 0.0
        self.done = 0.0

    def stages(self, stats: Any) -> dict[str, float]:
        """Return seconds by stage. `stats`: vLLM's `RequestStateStats` of a request with a token.

        Clocks of two processes are read a moment apart: a stage is never less than 0.
        """
        marks = (
            self.arrived,
            self.tokenized,
            stats.queued_ts,
            stats.scheduled_ts,
            stats.first_token_ts,
            stats.last_token_ts,
            self.done,
        )
        return {
            stage: max(0.0, end - start)
            for stage, start, end in zip(STAGES, marks, marks[1:], strict=False)
        }


class Stages:
    """Metrics of one worker."""

    def __init__(self) -> None:
        seconds = metric(
            prometheus_client.Histogram,
            "scalellm:request_stage_seconds",
            "Time of a request by stage.",
            ("stage",),
            buckets=_BUCKETS,
        )
        self._histograms = [seconds.labels(stage) for stage in STAGES]
        self._total = metric(
            prometheus_client.Counter,
            "scalellm:request_seconds",
            "Seconds from complete request to last byte, of all requests of the fast lane.",
        )
        self._gateway = metric(
            prometheus_client.Counter,
            "scalellm:gateway_seconds",
            "Those of these seconds that were not the engine's.",
        )
        self._share = metric(
            prometheus_client.Gauge,
            "scalellm:gateway_share",
            "The gateway's share of end-to-end latency since the start (0-1).",
            multiprocess_mode="mostrecent",
        )
        self._seconds = [0.0, 0.0]

    def count(self, stages: dict[str, float]) -> None:
        """Count one finished request."""
        total = gateway = 0.0
        for (stage, value), histogram in zip(stages.items(), self._histograms, strict=True):
            histogram.observe(value)
            total += value
            if stage not in _ENGINE:
                gateway += value
        self._total.inc(total)
        self._gateway.inc(gateway)
        seconds = self._seconds
        seconds[0] += gateway
        seconds[1] += total
        if seconds[1]:
            self._share.set(seconds[0] / seconds[1])


def server_timing(stages: dict[str, float]) -> bytes:
    """Return a `Server-Timing` header line; milliseconds, as the header has them."""
    milliseconds = [value * 1e3 for value in stages.values()]
    return _HEADER % (*milliseconds, sum(milliseconds))
