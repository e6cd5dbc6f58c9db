"""The ideal that servers are compared with: the load generator's own requests, in virtual time."""

from __future__ import annotations

import json

import pytest

from scalellm_plugins.benchmarks.generators import Cell
from scalellm_plugins.benchmarks.ideals import Ideals, request_lengths
from scalellm_plugins.benchmarks.workloads import WORKLOADS, Body, Prompts, Template, Texts

WORDS = [f"word{number}" for number in range(100)]


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("streams", [1, 3, 8])
def test_requests_are_those_of_the_load_generator(name: str, streams: int) -> None:
    workload, waves = WORKLOADS[name], 9
    lengths = request_lengths(workload, streams, waves)
    texts = Texts(WORDS, 0)
    # With a template that adds nothing and answers of the right length, words are tokens.
    for index in range(streams):
        prompts = Prompts(workload, texts, Template(0), Body("m", True), index, streams)
        answer = ""
        for wave in range(waves + 1):
            body = json.loads(prompts.next(answer.encode()))
            answer = " ".join(["w"] * workload.output)
            prompt, output, cached = lengths[wave * streams + index]
            assert sum(len(m["content"].split()) for m in body["messages"]) == prompt
            assert body["max_tokens"] == output
            assert cached <= prompt - workload.prompt


def test_rates_are_plausible() -> None:
    ideals = Ideals("h200", "8b")
    short = [ideals.output_tok_s(Cell(WORKLOADS["short"], True, n)) or 0 for n in (1, 16, 64)]
    assert 100 < short[0] < short[1] < short[2]
    # Decoding alone: a step cannot take less than reading 16 GB of weights at 4.8 TB/s.
    assert short[2] < 64 / (16e9 / 4.8e12)
    streamed, whole = (ideals.output_tok_s(Cell(WORKLOADS["short"], s, 16)) for s in (True, False))
    assert streamed == whole


def test_limits_of_the_servers_count() -> None:
    cell = Cell(WORKLOADS["short"], True, 64)
    free = Ideals("h200", "8b").output_tok_s(cell)
    for args in (["--max-num-seqs", "16"], ["--x", "--max-num-seqs=16"]):
        limited = Ideals("h200", "8b", args).output_tok_s(cell)
        assert limited is not None
        assert free is not None
        assert limited < free / 2


def test_cycle() -> None:
    cell = Cell(WORKLOADS["short"], True, 16)
    ideals = Ideals("h200", "8b")
    assert ideals.cycle_s(cell) == pytest.approx(16 * 128 / (ideals.output_tok_s(cell) or 0))


def test_no_gpu_no_ideal() -> None:
    assert Ideals(None, None).cycle_s(Cell(WORKLOADS["short"], True, 1)) == 0
    assert Ideals(None, None).output_tok_s(Cell(WORKLOADS["short"], True, 1)) is None
