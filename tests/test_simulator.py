"""The simulated GPU: its clock and its steps in isolation, then real engines on it.

Nothing here asserts real time: engines and futures run on a virtual clock, where a step's end is
arithmetic. That real time agrees is for `python -m scalellm_plugins.benchmarks.sim_clock` to show.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scalellm_plugins.errors import ConfigError
from scalellm_plugins.simulator.banner import banner
from scalellm_plugins.simulator.model_dir import MAX_POSITIONS, make_model_dir
from scalellm_plugins.simulator.options import SimConfig, simulation
from scalellm_plugins.simulator.roofline import Roofline, gpu_preset, model_preset
from scalellm_plugins.simulator.steps import Requests
from scalellm_plugins.simulator.timeline import StepFuture, SystemClock, Timeline, VirtualClock
from scalellm_plugins.simulator.tokens import (
    MASK,
    SIZE,
    seed_of,
    table,
    vocabulary_of,
    word_ids,
)

H200 = Roofline(gpu_preset("h200"), model_preset("8b"))


# The clock


def test_steps_queue_back_to_back() -> None:
    timeline = Timeline(VirtualClock())
    assert [timeline.submit(0.5) for _ in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert timeline.busy_s == 2.0
    assert timeline.steps == 4


def test_a_late_submission_leaves_the_device_idle() -> None:
    clock = VirtualClock()
    timeline = Timeline(clock)
    timeline.submit(1.0)
    clock.sleep_until(3.0)
    assert timeline.submit(1.0) == 4.0
    assert timeline.busy_s == 2.0


def test_speed_divides_step_times() -> None:
    assert Timeline(VirtualClock(), speed=4.0).submit(1.0) == 0.25


def test_the_system_clock_never_returns_early() -> None:
    clock = SystemClock()
    for _ in range(20):
        deadline = clock.now() + 0.0005
        clock.sleep_until(deadline)
        assert clock.now() >= deadline
    clock.sleep_until(clock.now() - 1)


def test_a_future_is_done_at_its_deadline() -> None:
    clock = VirtualClock()
    future = StepFuture("tokens", 1.0, clock)
    assert not future.done()
    assert future.running()
    assert not future.cancel()
    with pytest.raises(TimeoutError):
        future.result(timeout=0.25)
    assert clock.now() == 0.25
    assert future.result() == "tokens"
    assert clock.now() == 1.0
    assert future.done()
    assert future.exception() is None
    assert future.result(timeout=0) == "tokens"


def test_a_future_is_done_without_being_waited_for() -> None:
    clock = VirtualClock()
    future = StepFuture("tokens", 1.0, clock)
    clock.sleep_until(2.0)
    assert future.done()
    called: list[Any] = []
    future.add_done_callback(called.append)
    assert called == [future]


def test_a_callback_before_the_deadline_is_called_at_it() -> None:
    clock = SystemClock()
    future = StepFuture("tokens", clock.now() + 0.01, clock)
    called: list[Any] = []
    future.add_done_callback(called.append)
    assert wait([future], timeout=30).done == {future}
    assert future._timer is not None
    future._timer.join(30)
    assert called == [future]


# Steps


def new(id_: str, prompt: int, computed: int = 0, known: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        req_id=id_,
        prompt_token_ids=list(range(prompt)),
        prompt_len=prompt,
        num_computed_tokens=computed,
        prefill_token_ids=None if known is None else list(range(known)),
    )


def scheduled(
    shares: dict[str, int],
    new_requests: tuple[SimpleNamespace, ...] = (),
    cached: tuple[tuple[str, int, int], ...] = (),
) -> SimpleNamespace:
    """`cached` is (id, computed tokens, output tokens)."""
    return SimpleNamespace(
        scheduled_new_reqs=list(new_requests),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[c[0] for c in cached],
            num_computed_tokens=[c[1] for c in cached],
            num_output_tokens=[c[2] for c in cached],
        ),
        num_scheduled_tokens=shares,
        total_num_scheduled_tokens=sum(shares.values()),
    )


@pytest.fixture
def known_requests() -> Requests:
    return Requests(H200, list(range(SIZE)))


def test_a_prompt_in_chunks_says_nothing_before_its_end(known_requests: Requests) -> None:
    first = known_requests.step(scheduled({"a": 60}, (new("a", 100),)))
    assert first.tokens == [[]]
    assert first.seconds == H200.step_seconds(60, 0, 60, prefill_pairs=1830)
    second = known_requests.step(scheduled({"a": 40}, cached=(("a", 60, 0),)))
    assert len(second.tokens[0]) == 1
    assert second.seconds == H200.step_seconds(
        40, 0, 100, prefill_pairs=60 * 40 + 820, prefill_rows=1
    )


def test_a_one_token_chunk_of_a_prompt_is_not_a_decode(known_requests: Requests) -> None:
    known_requests.step(scheduled({"a": 50, "b": 60}, (new("a", 50), new("b", 100))))
    both = scheduled({"a": 1, "b": 1}, cached=(("a", 50, 1), ("b", 60, 0)))
    step = known_requests.step(both)
    assert [len(tokens) for tokens in step.tokens] == [1, 0]
    assert step.index == {"a": 0, "b": 1}


def test_decodes_read_their_whole_context(known_requests: Requests) -> None:
    known_requests.step(scheduled({"a": 10, "b": 20}, (new("a", 10), new("b", 20))))
    for output in range(1, 4):
        cached = (("a", 9 + output, output), ("b", 19 + output, output))
        step = known_requests.step(scheduled({"a": 1, "b": 1}, cached=cached))
        assert step.seconds == H200.step_seconds(0, 2, 30 + 2 * output)
        assert [len(tokens) for tokens in step.tokens] == [1, 1]
    alone = known_requests.step(scheduled({"b": 1}, cached=(("b", 23, 4),)))
    assert alone.request_ids == ["b"]
    assert alone.seconds == H200.step_seconds(0, 1, 24)


def test_the_two_paths_say_the_same(known_requests: Requests) -> None:
    known_requests.step(scheduled({"a": 10}, (new("a", 10),)))
    decode = scheduled({"a": 1}, cached=(("a", 10, 1),))
    fast = known_requests.step(decode)
    slow = known_requests._mixed_step(decode.num_scheduled_tokens, [], decode.scheduled_cached_reqs)
    assert fast == slow


def test_cached_prefixes_are_not_computed_again(known_requests: Requests) -> None:
    step = known_requests.step(scheduled({"a": 8}, (new("a", 1000, computed=992),)))
    pairs = 992 * 8 + 36
    assert step.seconds == H200.step_seconds(8, 0, 1000, prefill_pairs=pairs, prefill_rows=1)
    assert len(step.tokens[0]) == 1


@pytest.mark.parametrize("second_runner", [False, True])
def test_a_preempted_request_goes_on_where_it_was(
    known_requests: Requests, second_runner: bool
) -> None:
    known_requests.step(scheduled({"a": 10}, (new("a", 10),)))
    said = known_requests.step(scheduled({"a": 1}, cached=(("a", 10, 1),))).tokens
    expected = known_requests.step(scheduled({"a": 1}, cached=(("a", 11, 2),))).tokens
    assert said != expected
    # Resumed: 12 tokens are known of it, none is computed.
    if second_runner:
        resumed = scheduled({"a": 7}, (new("a", 10, known=12),))
    else:
        resumed = scheduled({"a": 7}, cached=(("a", 0, 2),))
    assert known_requests.step(resumed).tokens == [[]]
    rest = known_requests.step(scheduled({"a": 5}, cached=(("a", 7, 2),)))
    assert rest.tokens == expected


def test_finished_requests_are_forgotten(known_requests: Requests) -> None:
    known_requests.step(scheduled({"a": 10, "b": 5}, (new("a", 10), new("b", 5))))
    known_requests.finish({"a", "unheard-of"})
    assert len(known_requests) == 1


# Tokens


def test_words_have_a_space_and_are_not_special() -> None:
    plain = {"<s>": 0, "Ġ": 1, "Ġ1": 2, "Upper": 3, "word": 4}
    spaced = {f"Ġ{chr(97 + i)}x": 10 + i for i in range(20)}
    assert word_ids({**plain, **spaced}) == list(range(10, 30))
    assert word_ids(plain) == [4]


def test_the_table_avoids_what_it_is_told_to() -> None:
    assert len(table([1, 2, 3], 10)) == SIZE == MASK + 1
    assert set(table([1, 2, 3, 99], 10, avoid=[2])) == {1, 3}
    assert set(table([], 100)) == set(range(25, 75))
    assert set(table([], 1)) == {0}
    assert table(range(500), 1000) == table(range(500), 1000)


def test_answers_differ_by_prompt_and_not_by_request() -> None:
    assert seed_of([1, 2, 3]) == seed_of([1, 2, 3])
    assert seed_of([1, 2, 3]) != seed_of([1, 2, 4])
    assert seed_of([]) == seed_of(None) == 0


def test_vocabularies_of_both_kinds_are_read(tmp_path: Path) -> None:
    assert vocabulary_of(tmp_path) == {}
    file = tmp_path / "tokenizer.json"
    added = [{"content": "<s>", "id": 0}]
    file.write_text(json.dumps({"model": {"vocab": {"<s>": 0, "a": 1}}, "added_tokens": added}))
    assert vocabulary_of(tmp_path) == {"a": 1}
    file.write_text(json.dumps({"model": {"vocab": [["<s>", 0.0], ["▁a", -1.5]]}}))
    assert vocabulary_of(tmp_path) == {"<s>": 0, "▁a": 1}
    file.write_text("not json")
    assert vocabulary_of(tmp_path) == {}


# Options and files


def test_options_are_resolved() -> None:
    ours = simulation(SimConfig(model="70b"), tensor_parallel_size=1)
    assert ours.summary == "70b on 4 × h200"
    assert simulation(SimConfig(), tensor_parallel_size=2).summary == "8b on 2 × h200"
    both = SimConfig(tensor_parallel=8)
    assert simulation(both, tensor_parallel_size=2).roofline.model.tensor_parallel == 8


def test_the_banner_says_that_nothing_is_computed() -> None:
    text = banner(simulation(SimConfig(speed=2.0)), blocks=1000, block_size=16)
    assert "NOTHING IS COMPUTED" in text
    assert "8b on 1 × h200, speed × 2" in text
    assert "16,000 tokens" in text
    assert len({len(line) for line in text.splitlines()}) == 1


def test_a_model_directory_has_a_shape_and_a_tokenizer_and_no_weights(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        make_model_dir("8b", source, tmp_path / "out")
    added = [{"content": "<s>", "id": 7}]
    (source / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": added})
    )
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "config.json").write_text(json.dumps({"eos_token_id": 7, "hidden_size": 1}))
    (source / "model.safetensors").write_text("weights")
    out = make_model_dir("70b", source, tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "tokenizer.json", "chat_template.jinja"}
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == 8
    assert config["hidden_size"] == 8192
    assert config["eos_token_id"] == 7
    assert config["max_position_embeddings"] == MAX_POSITIONS


# Real engines


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the scenarios saw; see simulator_scenarios.py."""
    script = Path(__file__).with_name("simulator_scenarios.py")
    scratch = tmp_path_factory.mktemp("simulator")
    process = subprocess.run(
        [sys.executable, str(script), str(scratch)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    result["stderr"] = process.stderr
    return result


@pytest.mark.vllm
class TestEngines:
    def test_scheduling_is_asynchronous_as_on_cuda(self, found: dict[str, Any]) -> None:
        plenty = found["plenty"]
        assert plenty["executor"] == "SimulatedExecutor"
        assert plenty["asynchronous"] is True
        assert plenty["batches"] == 2

    def test_synchronous_scheduling_works_too(self, found: dict[str, Any]) -> None:
        assert found["synchronous"]["batches"] == 1
        assert found["synchronous"]["tokens"] == found["plenty"]["tokens"]

    def test_answers_are_as_long_as_asked_for(self, found: dict[str, Any]) -> None:
        assert found["plenty"]["lengths"] == found["plenty"]["wanted_lengths"]

    def test_answers_are_the_same_every_time(self, found: dict[str, Any]) -> None:
        plenty = found["plenty"]
        assert plenty["texts"] == plenty["again"]
        assert len(set(plenty["texts"])) == len(plenty["texts"])

    def test_answers_are_words_that_encode_to_themselves(self, found: dict[str, Any]) -> None:
        plenty = found["plenty"]
        assert plenty["reencoded"] == plenty["tokens"]
        assert not {t for tokens in plenty["tokens"] for t in tokens} & set(plenty["special"])

    def test_long_prompts_are_computed_in_chunks(self, found: dict[str, Any]) -> None:
        seconds, steps = found["plenty"]["cold"]
        expected = sum(
            H200.step_seconds(
                count,
                0,
                before + count,
                prefill_pairs=before * count + count * (count + 1) // 2,
                prefill_rows=int(before + count == 3000),
            )
            for before, count in ((0, 1024), (1024, 1024), (2048, 952))
        )
        expected += sum(H200.step_seconds(0, 1, 3000 + i) for i in (1, 2, 3))
        assert steps == 6
        assert seconds == pytest.approx(expected)

    def test_prefix_cache_hits_shorten_the_timeline(self, found: dict[str, Any]) -> None:
        seconds, steps = found["plenty"]["warm"]
        cached = 2992  # whole blocks of 16, and one token at least is computed
        expected = H200.step_seconds(8, 0, 3000, prefill_pairs=cached * 8 + 36, prefill_rows=1)
        expected += sum(H200.step_seconds(0, 1, 3000 + i) for i in (1, 2, 3))
        assert steps == 4
        assert seconds == pytest.approx(expected)

    def test_kv_capacity_comes_from_the_card(self, found: dict[str, Any]) -> None:
        plenty = found["plenty"]
        capacity = H200.kv_capacity_bytes(plenty["utilization"])
        assert plenty["blocks"] == capacity // (16 * H200.model.kv_bytes_per_token())

    def test_preemption_finishes_everything_with_the_same_tokens(
        self, found: dict[str, Any]
    ) -> None:
        assert found["scarce"]["blocks"] == 20
        assert found["scarce"]["preemptions"] > 0
        assert found["scarce"]["tokens"] == found["plenty"]["tokens"]

    def test_logprobs_are_plausible(self, found: dict[str, Any]) -> None:
        for position in found["plenty"]["logprobs"]:
            assert len(position) == 3
            values = list(position.values())
            assert values == sorted(values, reverse=True)
            assert all(value < 0 for value in values)

    def test_grammars_are_obeyed(self, found: dict[str, Any]) -> None:
        assert isinstance(json.loads(found["plenty"]["json"])["a"], int)

    def test_aborted_requests_disturb_nobody(self, found: dict[str, Any]) -> None:
        assert len(found["plenty"]["aborted"]) == 50
        # The last request's end is told with the next step.
        assert found["plenty"]["remembered"] <= 1

    def test_what_cannot_be_simulated_is_refused_by_name(self, found: dict[str, Any]) -> None:
        assert "prompt_logprobs" in found["plenty"]["refused"]
        assert "load_weights" in found["plenty"]["rpc"]
        refused = found["unsupported"]
        assert "Valid: h200" in refused["unknown_gpu"]
        assert "scalellm.sim.tensor_parallel to 8" in refused["too_large"]
        assert "--speculative-config" in refused["speculative"]

    def test_the_banner_is_printed_once_per_engine(self, found: dict[str, Any]) -> None:
        assert found["stderr"].count("NOTHING IS COMPUTED") == 3
