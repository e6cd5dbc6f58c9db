"""Step times, KV capacity and ideal runs: pure arithmetic, so mostly properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.errors import ConfigError
from scalellm_plugins.simulator.ideal import Batching, Request, run
from scalellm_plugins.simulator.roofline import (
    GPUS,
    MODELS,
    Gpu,
    Model,
    Roofline,
    gpu_preset,
    model_preset,
)

gpus = st.sampled_from(sorted(GPUS)).map(gpu_preset)
models = st.sampled_from(sorted(MODELS)).map(model_preset)
rooflines = st.builds(Roofline, gpus, models)
counts = st.integers(0, 4096)

# Published sizes, in parameters: the models' own cards.
PUBLISHED = {
    "0.6b": 0.596e9,
    "1b": 1.24e9,
    "8b": 8.03e9,
    "30b-a3b": 30.5e9,
    "32b": 32.8e9,
    "70b": 70.6e9,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_follow_from_the_shape(name: str) -> None:
    assert MODELS[name].params == pytest.approx(PUBLISHED[name], rel=0.01)


def test_active_parameters_of_a_mixture_are_few() -> None:
    mixture = MODELS["30b-a3b"]
    assert mixture.active_params == pytest.approx(3.3e9, rel=0.1)
    assert MODELS["8b"].active_params < MODELS["8b"].params


@pytest.mark.parametrize("name", GPUS)
def test_efficiencies_are_fractions(name: str) -> None:
    gpu = GPUS[name]
    for fraction in (gpu.gemm_efficiency, gpu.attention_efficiency, gpu.bandwidth_efficiency):
        assert 0.2 < fraction < 1


def test_an_8b_decode_of_64_streams_on_an_h200_takes_six_to_seven_ms() -> None:
    roofline = Roofline(gpu_preset("H200"), model_preset("8b"))
    assert 6e-3 < roofline.step_seconds(0, 64, 64 * 300) < 7e-3


@given(rooflines, counts, counts, counts, counts, counts)
def test_more_work_never_takes_less_time(
    roofline: Roofline, prefill: int, decodes: int, context: int, more: int, context_more: int
) -> None:
    base = roofline.step_seconds(prefill, decodes, context)
    assert roofline.step_seconds(prefill + more, decodes, context) >= base
    assert roofline.step_seconds(prefill, decodes + more, context) >= base
    assert roofline.step_seconds(prefill, decodes, context + context_more) >= base
    assert roofline.step_seconds(prefill, decodes, context, prefill_pairs=more) >= base
    assert roofline.step_seconds(prefill, decodes, context, prefill_rows=more) >= base


@given(rooflines, st.integers(1, 4096))
def test_a_step_takes_the_floor_and_an_empty_one_nothing(roofline: Roofline, tokens: int) -> None:
    assert roofline.step_seconds(0, tokens, tokens) > roofline.floor_s > 0
    assert roofline.step_seconds(0, 0, 0) == 0


@given(rooflines, st.integers(1, 4096))
def test_a_step_is_never_faster_than_the_datasheet(roofline: Roofline, tokens: int) -> None:
    gpu, model = roofline.gpu, roofline.model
    seconds = roofline.step_seconds(0, tokens, tokens)
    cards = model.tensor_parallel
    flops = 2 * (model.active_params - model.head_params) * tokens
    assert seconds > flops / cards / gpu.peak_flops
    if model.experts == 1:
        read = (model.active_params * model.dtype_bytes) / cards
        assert seconds > read / gpu.memory_bandwidth


@given(gpus, st.sampled_from([1, 2, 4, 8]))
def test_more_cards_shorten_a_long_prefill_but_not_n_fold(gpu: Gpu, cards: int) -> None:
    one = Roofline(gpu, model_preset("70b", 1)).step_seconds(4096, 0, 4096)
    many = Roofline(gpu, model_preset("70b", cards)).step_seconds(4096, 0, 4096)
    assert many >= one / cards
    if cards > 1 and gpu.link_bandwidth > 100e9:
        assert many < one


@given(st.integers(1, 512))
def test_a_mixture_reads_more_experts_for_more_tokens(tokens: int) -> None:
    roofline = Roofline(gpu_preset("h100"), model_preset("30b-a3b"))
    all_weights = MODELS["30b-a3b"].weight_bytes / (3350e9 * 0.7)
    assert roofline.step_seconds(0, tokens, tokens) < roofline.step_seconds(0, tokens + 1, tokens)
    assert roofline.step_seconds(0, 1, 1) < all_weights / 4


def test_kv_capacity_is_what_the_weights_leave() -> None:
    roofline = Roofline(gpu_preset("h200"), model_preset("8b"))
    used = roofline.kv_capacity_bytes(0.9) + roofline.model.weight_bytes
    assert 0.85 * 141e9 < used < 0.9 * 141e9
    assert roofline.model.kv_bytes_per_token() == 131072
    assert model_preset("70b").kv_bytes_per_token(4) == 81920
    assert model_preset("70b").kv_bytes_per_token(64) == 80 * 2 * 128 * 2


def test_a_model_that_does_not_fit_names_the_cards_that_would_do() -> None:
    roofline = Roofline(gpu_preset("h100"), model_preset("70b", 1))
    with pytest.raises(ConfigError, match=r"scalellm\.sim\.tensor_parallel to 4"):
        roofline.kv_capacity_bytes(0.6)
    hopeless = Model("vast", 100, 16384, 1, 1, 128, 65536, 128256)
    with pytest.raises(ConfigError, match="larger card"):
        Roofline(gpu_preset("l4"), hopeless).kv_capacity_bytes(0.9)


def test_unknown_presets_list_the_closest_first() -> None:
    with pytest.raises(ConfigError, match=r"scalellm\.sim\.gpu: 'h20' is unknown.*Valid: h200, "):
        gpu_preset("h20")
    with pytest.raises(ConfigError, match=r"scalellm\.sim\.model: '7b' .*Valid: "):
        model_preset("7b")
    with pytest.raises(ConfigError, match=r"scalellm\.sim\.tensor_parallel: 3 cards"):
        model_preset("8b", 3)


# Ideal runs

requests = st.lists(
    st.builds(Request, st.integers(1, 3000), st.integers(1, 200), st.integers(0, 3000)),
    min_size=1,
    max_size=40,
)
batchings = st.builds(
    Batching,
    max_num_batched_tokens=st.integers(64, 4096),
    max_num_seqs=st.integers(1, 64),
    asynchronous=st.booleans(),
)
H200 = Roofline(gpu_preset("h200"), model_preset("8b"))


@given(requests, st.integers(1, 50), batchings)
def test_an_ideal_run_conserves_tokens(
    work: list[Request], streams: int, batching: Batching
) -> None:
    ideal = run(work, streams, H200, batching)
    assert ideal.requests == len(work)
    assert ideal.output_tokens == sum(r.output_tokens for r in work)
    assert ideal.prompt_tokens == sum(
        r.prompt_tokens - min(r.cached_tokens, r.prompt_tokens - 1) for r in work
    )


@given(requests, st.integers(1, 50), batchings)
def test_an_ideal_run_is_never_faster_than_its_roofline(
    work: list[Request], streams: int, batching: Batching
) -> None:
    ideal = run(work, streams, H200, batching)
    together = min(streams, batching.max_num_seqs)
    # Nobody decodes faster than the fullest batch of sequences without a context.
    assert ideal.output_tokens_per_s <= together / H200.step_seconds(0, together, 0)
    assert ideal.steps >= max(r.output_tokens for r in work)
    assert ideal.seconds >= ideal.steps * H200.step_seconds(0, 1, 0)
    assert ideal.ttft.p50 <= ideal.ttft.p90 <= ideal.ttft.p99 <= ideal.seconds
    assert ideal.itl.p50 <= ideal.itl.p90 <= ideal.itl.p99


def test_one_stream_takes_a_prefill_and_its_decodes() -> None:
    ideal = run([Request(1000, 5)], 1, H200)
    prefill = H200.step_seconds(1000, 0, 1000, prefill_pairs=500500, prefill_rows=1)
    decodes = [H200.step_seconds(0, 1, context) for context in (1001, 1002, 1003, 1004)]
    assert ideal.steps == 5
    assert ideal.ttft.mean == pytest.approx(prefill)
    assert ideal.seconds == pytest.approx(prefill + sum(decodes))


def test_long_prompts_are_chunked_beside_decodes() -> None:
    work = [Request(100, 80), Request(100, 10), Request(4096, 2)]
    chunked = run(work, 2, H200, Batching(max_num_batched_tokens=512, max_num_seqs=8))
    whole = run(work, 2, H200, Batching(max_num_batched_tokens=8192, max_num_seqs=8))
    assert chunked.itl.p99 < whole.itl.p99 / 4
    assert chunked.ttft.p99 > whole.ttft.p99


def test_cached_prompts_start_sooner() -> None:
    cold = run([Request(4000, 2)] * 8, 4, H200)
    warm = run([Request(4000, 2, cached_tokens=3968)] * 8, 4, H200)
    assert warm.ttft.mean < cold.ttft.mean / 5
    assert warm.prompt_tokens == 8 * 32


def test_asynchronous_scheduling_costs_newcomers_a_step() -> None:
    work = [Request(16, 20 + i % 7) for i in range(64)]
    sync = run(work, 8, H200)
    late = run(work, 8, H200, Batching(asynchronous=True))
    assert late.ttft.mean > sync.ttft.mean
    assert late.seconds > sync.seconds


def test_speed_scales_all_times() -> None:
    work = [Request(64, 16)] * 8
    slow, fast = run(work, 4, H200), run(work, 4, H200, speed=2.0)
    assert fast.seconds == pytest.approx(slow.seconds / 2)
    assert fast.itl.p50 == pytest.approx(slow.itl.p50 / 2)
    assert fast.output_tokens_per_s == pytest.approx(slow.output_tokens_per_s * 2)


@pytest.mark.parametrize(
    ("work", "streams", "batching", "text"),
    [
        ([Request(0, 1)], 1, None, "prompt"),
        ([Request(1, 0)], 1, None, "output"),
        ([Request(1, 1)], 0, None, "streams"),
        ([Request(1, 1)], 1, Batching(8, 16), "max_num_batched_tokens"),
    ],
)
def test_impossible_runs_say_why(
    work: list[Request], streams: int, batching: Batching | None, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        run(work, streams, H200, batching)
