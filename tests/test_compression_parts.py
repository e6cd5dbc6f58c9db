"""The pure parts of `scalellm compress`: words, scales, files, rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from scalellm_plugins.compression.calibration import load  # noqa: E402
from scalellm_plugins.compression.checkpoint import open_checkpoint  # noqa: E402
from scalellm_plugins.compression.container import TensorSpec, Writer, read_header  # noqa: E402
from scalellm_plugins.compression.plan import Selection, kept_channels, new_config, steps  # noqa: E402
from scalellm_plugins.compression.quantize import pack, quantize, unpack  # noqa: E402
from scalellm_plugins.compression.recipe import CHANNEL, Recipe, check, differences  # noqa: E402
from scalellm_plugins.errors import ConfigError  # noqa: E402

from .compression_parts import DEMO, write_text  # noqa: E402

BITS = st.sampled_from((4, 8))


def codes(bits: int) -> st.SearchStrategy[np.ndarray]:
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    shapes = st.tuples(
        st.integers(1, 4).map(lambda n: n * 8), st.integers(1, 4).map(lambda n: n * 8)
    )
    return shapes.flatmap(
        lambda shape: arrays.arrays(np.int8, shape, elements=st.integers(low, high))
    )


@given(bits=BITS, axis=st.sampled_from((0, 1)), data=st.data())
def test_words_are_those_of_compressed_tensors(bits: int, axis: int, data: st.DataObject) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    matrix = torch.from_numpy(data.draw(codes(bits)))
    words = pack(matrix, bits, axis)
    assert torch.equal(words, helpers.pack_to_int32(matrix, bits, axis))
    assert torch.equal(unpack(words, bits, axis), matrix)


WEIGHTS = arrays.arrays(
    np.float32, (3, 64), elements=st.floats(-8, 8, width=16) | st.sampled_from((0.0, 1e-6, 100.0))
)


@given(WEIGHTS, BITS, st.sampled_from((32, 64)), st.sampled_from(("bfloat16", "float16")))
def test_a_weight_is_off_by_half_a_step_or_clipped(
    weights: np.ndarray, bits: int, size: int, dtype: str
) -> None:
    weight = torch.from_numpy(weights).to(getattr(torch, dtype))
    made = quantize(weight, bits, size)
    step = made.scales.float().repeat_interleave(size, dim=1)
    off = (made.weights() - weight.float()).abs()
    clipped = (made.codes == -(1 << bits - 1)) | (made.codes == (1 << bits - 1) - 1)
    assert made.scales.dtype == weight.dtype
    assert ((off <= step * 0.5001 + 1e-12) | clipped).all()
    assert (made.weights()[weight == 0] == 0).all()


@given(weights=WEIGHTS, bits=BITS)
def test_the_search_is_no_worse_than_the_largest_weight(weights: np.ndarray, bits: int) -> None:
    """Would fail if a candidate were judged with another scale than the one that is stored."""
    weight = torch.from_numpy(weights).bfloat16()
    made = quantize(weight, bits, 32)
    groups = weight.float().reshape(3, 2, 32)
    high = (1 << bits - 1) - 1
    plain = (groups.abs().amax(-1) / high).bfloat16().float()
    plain = torch.where(plain > 0, plain, 1.0).unsqueeze(-1)
    naive = ((groups / plain).round().clamp(-high - 1, high) * plain - groups).square().sum()
    error = (made.weights() - weight.float()).square().sum()
    assert error <= naive * 1.0001 + 1e-6


@given(weights=WEIGHTS)
def test_zero_points_use_the_whole_range(weights: np.ndarray) -> None:
    """Weights of one sign get sixteen steps, not eight; zero is one of them."""
    weight = torch.from_numpy(np.abs(weights)).bfloat16()
    made = quantize(weight, 4, 32, symmetric=False)
    groups = weight.float().reshape(3, 2, 32)
    off = (made.weights().reshape(groups.shape) - groups).square().sum(-1).sqrt()
    step = groups.amax(-1) / 15
    # Half a step each, if nothing is clipped; a bf16 scale may be off by 1/256 of fifteen steps.
    assert (off <= step * 0.6 * 32**0.5 + 1e-6).all()
    assert (made.weights()[weight == 0] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    weight = torch.ones(2, 32)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="infinite or not a number"):
        quantize(weight, 4, 32)


def test_a_file_written_out_of_order_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.int8),
        "wide": torch.arange(4, dtype=torch.int64),
        "half": torch.ones(5, dtype=torch.bfloat16),
    }
    kinds = {"odd": "I8", "wide": "I64", "half": "BF16"}
    specs = [TensorSpec(name, kinds[name], tuple(t.shape)) for name, t in tensors.items()]
    path = tmp_path / "x.safetensors"
    with Writer(path, specs) as file:
        for name, tensor in tensors.items():
            assert not path.exists()
            file.write(name, tensor.view(torch.uint8).numpy().tobytes())
    read = safetensors_torch.load_file(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert read_header(path) == {spec.name: spec for spec in specs}


def test_an_unfinished_file_is_removed(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "I8", (1,))]
    with pytest.raises(KeyError), Writer(tmp_path / "x", specs) as file:
        file.write("b", b"1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(), "nothing to do"),
        (Recipe(drop_layers=1), "--calibration"),
        (Recipe(drop_layers=-1, text="x"), "0 or more"),
        (Recipe(prune_ffn=1.0, text="x"), "0 ≤ R < 1"),
        (Recipe(prune_ffn=0.5, text="x", ignore=("a",)), "give one"),
        (Recipe("int8", symmetric=False), "int4 only"),
        (Recipe("int4", group_size=48), "128, channel"),
    ],
)
def test_options_that_cannot_be(recipe: Recipe, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(recipe)


def test_w8a8_is_by_channel() -> None:
    assert check(Recipe("w8a8")).group_size == CHANNEL


@given(share=st.floats(0.01, 0.99), channels=st.integers(4, 200).map(lambda n: n * 64))
def test_cut_mlps_stay_multiples(share: float, channels: int) -> None:
    recipe = Recipe("int4", prune_ffn=share, text="x")
    try:
        kept = kept_channels(recipe, channels)
    except ConfigError:
        return
    assert kept % 128 == 0
    assert 0 < kept < channels
    assert abs(kept - channels * (1 - share)) <= 128


def test_layers_are_renumbered_and_lists_by_layer_follow() -> None:
    checkpoint = open_checkpoint(DEMO)
    checkpoint.config["layer_types"] = list("abcde")
    recipe = Recipe("int4", drop_layers=2, text="x", ignore=("model.layers.4.mlp.down_proj",))
    selection = Selection((0, 2, 4))
    (plan,) = steps(checkpoint, recipe, selection).values()
    targets = {step.source: step.target for step in plan}
    assert targets["model.layers.4.mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight"
    assert "model.layers.1.mlp.up_proj.weight" not in targets
    config = new_config(checkpoint, recipe, selection)
    assert (config["num_hidden_layers"], config["layer_types"]) == (3, ["a", "c", "e"])
    # By its new number: vLLM compares with the names in OUT.
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.layers.2.mlp.down_proj"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("*.q_proj", "as one layer"), ("*.dwon_proj", "no linear layer has such a name")],
)
def test_patterns_that_vllm_could_not_follow(pattern: str, said: str) -> None:
    checkpoint = open_checkpoint(DEMO)
    with pytest.raises(ConfigError, match=said):
        steps(checkpoint, Recipe("int4", ignore=(pattern,)), Selection(tuple(range(5))))


def test_differences_name_the_options() -> None:
    assert differences(Recipe("int4"), Recipe("int8")) == ["--scheme: 'int4' then, 'int8' now"]


def test_quality_is_measured_on_what_the_assistant_says(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    text = load(write_text(tmp_path / "text.jsonl"), tokenizer, 1000)
    row = text.held_out[0]
    scored = [i for i, judged in zip(row.ids, row.scored, strict=True) if judged]
    assert tokenizer.decode(scored) == "1 + 5 = 6.<|end|>"
    chosen = {tuple(row.ids) for row in text.chosen_by}
    assert not chosen & {tuple(row.ids) for row in text.held_out}


def test_plain_text_is_cut_in_windows_and_all_of_it_counts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    path = tmp_path / "text.txt"
    path.write_text("What is the capital of France? " * 200)
    text = load(path, tokenizer, 600)
    assert all(all(row.scored) for row in text.held_out)
    assert 600 <= sum(map(len, text.chosen_by)) < 600 + 512
    path.write_text("too short")
    with pytest.raises(ConfigError, match="too few"):
        load(path, tokenizer, 600)
