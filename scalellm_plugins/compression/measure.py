"""Before and after: what a model says about held-out text, and how fast it decodes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from .calibration import Row
from .models import batches, grouped
from .progress import track

ROUNDS = 5
DECODED = 64
"""Tokens of a timed answer."""


class Quality(msgspec.Struct, frozen=True):
    """Of the next token, over the held-out text: all of it, or what the assistant says.

    Attributes:
        tokens: positions.
        perplexity: exp of the mean loss, before and after.
        kl: mean KL divergence of the new distribution from the old one, nats.
        agreement: share of positions at which both like the same token best.
    """

    tokens: int
    perplexity: tuple[float, float]
    kl: float
    agreement: float


class Speed(msgspec.Struct, frozen=True):
    """Greedy decoding of one stream by transformers, tokens per second, before and after: medians
    of interleaved rounds, and those."""

    tokens_per_s: tuple[float, float]
    rounds: tuple[tuple[float, ...], tuple[float, ...]]
    threads: int


def quality(before: Any, after: Any, rows: Sequence[Row]) -> Quality:
    """Compare two causal LMs of one vocabulary; rows must have something that is scored."""
    losses, divergence, agreed, count = [0.0, 0.0], 0.0, 0, 0
    with torch.inference_mode():
        for ids, mask, scored in track(batches(rows), len(grouped(rows)), "quality"):
            judged = scored[:, 1:]
            old, new = (_log_probabilities(m, ids, mask, judged) for m in (before, after))
            targets = ids[:, 1:][judged]
            for place, scores in enumerate((old, new)):
                losses[place] += float(functional.nll_loss(scores, targets, reduction="sum"))
            divergence += float(functional.kl_div(new, old, reduction="sum", log_target=True))
            agreed += int((old.argmax(-1) == new.argmax(-1)).sum())
            count += len(targets)
    perplexities = (math.exp(losses[0] / count), math.exp(min(losses[1] / count, 700.0)))
    return Quality(count, perplexities, divergence / count, agreed / count)


def _log_probabilities(model: Any, ids: Tensor, mask: Tensor, judged: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits[judged].float(), -1)


def speed(before: Any, after: Any, prompt: Sequence[int]) -> Speed:
    """Time both in turns, so that what else the machine does meets both."""
    rounds: tuple[list[float], list[float]] = ([], [])
    ids = torch.tensor([list(prompt)])
    turns = [turn for _ in range(ROUNDS + 1) for turn in zip((before, after), rounds, strict=True)]
    for number, (model, rates) in enumerate(track(turns, len(turns), "speed")):
        rate = _decode(model, ids)
        if number >= 2:  # each one's first warms up
            rates.append(rate)
    medians = (statistics.median(rounds[0]), statistics.median(rounds[1]))
    return Speed(medians, (tuple(rounds[0]), tuple(rounds[1])), torch.get_num_threads())


def _decode(model: Any, ids: Tensor) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=DECODED,
            max_new_tokens=DECODED,
        )
    return float((made.shape[1] - ids.shape[1]) / (time.perf_counter() - start))
