"""Figures of a run: latencies, targets kept, throughput, shares of tenants. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from scalellm_plugins.scheduling.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT

from .fairness import bound
from .job import Record, Request, Run

SHARES = (0.50, 0.90, 0.99)
Pair = tuple[Request, Record]


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` (0-1) of the ordered values lie, interpolated linearly."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Mean, percentiles and maximum of times in s, in ms; None without any."""
    ordered = sorted(values)
    if not ordered:
        return None
    found = {"mean": sum(ordered) / len(ordered)}
    found |= {f"p{share * 100:.0f}": percentile(ordered, share) for share in SHARES}
    found["max"] = ordered[-1]
    return {name: round(value * 1e3, 4) for name, value in found.items()}


def ttft(request: Request, record: Record) -> float | None:
    """Arrival to first token, s; None without a token."""
    return None if record.first is None else record.first - request.at


def tpot(record: Record) -> float | None:
    """Time per output token after the first, s; None for answers of one token, or none."""
    if record.first is None or record.last is None or record.tokens < 2:
        return None
    return (record.last - record.first) / (record.tokens - 1)


def e2e(request: Request, record: Record) -> float | None:
    """Arrival to the end of the answer, s."""
    return None if record.last is None else record.last - request.at


def has_target(request: Request) -> bool:
    """Whether a request has a target to keep."""
    return (request.ttft_ms or request.tpot_ms or request.deadline_ms) is not None


def kept(request: Request, record: Record) -> bool:
    """Whether a request was answered within all of its targets."""
    if record.outcome != "done":
        return False
    pairs = (
        (request.ttft_ms, ttft(request, record)),
        (request.tpot_ms, tpot(record)),
        (request.deadline_ms, e2e(request, record)),
    )
    return all(target is None or value is None or value * 1e3 <= target for target, value in pairs)


def summary(requests: Sequence[Request], run: Run) -> dict[str, Any]:
    """All figures of a run, for a table and for JSON. Times in ms unless their name says s."""
    pairs = list(zip(requests, run.records, strict=True))
    figures = _figures(pairs, run.seconds)
    figures |= {
        "seconds": round(run.seconds, 4),
        "steps": run.steps,
        "gpu_busy": round(run.busy_s / run.seconds, 5) if run.seconds else 0.0,
        "preemptions": sum(record.preemptions for record in run.records),
        "kv_mean": round(run.kv_mean, 5),
        "kv_max": round(run.kv_max, 5),
    }
    if len(run.tenants) > 1:
        figures["tenants"] = {
            name: _tenant([pair for pair in pairs if pair[0].tenant == name], run.seconds)
            for name in run.tenants
        }
        figures["fairness"] = _fairness(requests, run)
    return figures


def _figures(pairs: Sequence[Pair], seconds: float) -> dict[str, Any]:
    done = [pair for pair in pairs if pair[1].outcome == "done"]
    aimed = [pair for pair in pairs if has_target(pair[0])]
    good = [pair for pair in pairs if kept(*pair)]
    outcomes = [record.outcome for _, record in pairs]
    per_second = 1 / seconds if seconds else 0.0
    return {
        "requests": len(pairs),
        **{name: outcomes.count(name) for name in ("done", "dropped", "refused", "failed")},
        "ttft": spread(t for pair in pairs if (t := ttft(*pair)) is not None),
        "tpot": spread(t for _, record in done if (t := tpot(record)) is not None),
        "e2e": spread(t for pair in done if (t := e2e(*pair)) is not None),
        "queue": spread(r.scheduled - q.at for q, r in pairs if r.scheduled is not None),
        "attainment": sum(kept(*pair) for pair in aimed) / len(aimed) if aimed else None,
        "goodput_req_s": len(good) * per_second if aimed else None,
        "goodput_tok_s": sum(r.tokens for _, r in good) * per_second if aimed else None,
        "req_s": len(done) * per_second,
        "output_tok_s": sum(record.tokens for _, record in pairs) * per_second,
        "prompt_tok_s": sum(q.prompt for q, r in pairs if r.scheduled is not None) * per_second,
    }


def _tenant(pairs: Sequence[Pair], seconds: float) -> dict[str, Any]:
    prompt = sum(request.prompt for request, record in pairs if record.scheduled is not None)
    output = sum(record.tokens for _, record in pairs)
    weight = pairs[0][0].weight
    return _figures(pairs, seconds) | {
        "weight": weight,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "service": (PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output) / weight,
        "preemptions": sum(record.preemptions for _, record in pairs),
    }


def _fairness(requests: Sequence[Request], run: Run) -> dict[str, Any]:
    engine = run.engine
    limit = bound(requests, engine.max_num_seqs, engine.kv_blocks * engine.block_size)
    if run.gap is None:
        return {"gap": None, "bound": limit}
    return {
        "gap": round(run.gap.tokens, 3),
        "bound": limit,
        "between": list(run.gap.pair),
        "at_s": round(run.gap.until, 4),
    }
