"""Patterns that match no layer, and what is suggested instead. No vLLM."""

from __future__ import annotations

import pytest

from scalellm_plugins.config import QuantizationConfig
from scalellm_plugins.quantization.rules import names_of
from scalellm_plugins.quantization.unmatched import Seen, unmatched

PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
LINEAR = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def seen(*layers: int) -> Seen:
    """A Llama's layers of these numbers, in the order in which it makes them."""
    found = Seen()
    found.add([""], linear=False)  # its embedding, which has no name
    for layer in layers:
        for name in LINEAR:
            found.add(names_of(f"model.layers.{layer}.{name}", PACKED), linear=True)
    found.add(["lm_head"], linear=False)
    return found


@pytest.mark.parametrize(
    ("skip", "hint"),
    [
        ("*.down_porj", "'*.down_proj'"),
        ("down_porj", "'*.down_proj'"),
        ("*.layers.1.mlp.gate_porj", "'*.layers.1.mlp.gate_proj'"),
        ("o_proj", "'*.o_proj'"),
        ("self_attn.o_proj", "'*.self_attn.o_proj'"),
        ("*.layers.1", "'*.layers.1.*'"),
        ("layers.1", "'*.layers.1.*'"),
        ("*.nothing", ""),
        ("*.layers.7.*", ""),
    ],
)
def test_a_pattern_that_matches_nothing_is_named_with_what_would(skip: str, hint: str) -> None:
    (text,) = unmatched(QuantizationConfig(skip=skip), seen(0, 1))
    assert text.startswith(f"scalellm.quantization.skip: {skip!r} matches no layer")
    assert f"Did you mean {hint}?" in text if hint else "Did you mean" not in text
    assert "Layers here: " in text
    assert "Layers here: ," not in text


def test_layers_most_like_the_pattern_come_first() -> None:
    (text,) = unmatched(QuantizationConfig(keep_8bit="*.down_porj"), seen(0, 1))
    assert "Layers here: model.layers.0.mlp.down_proj, " in text
    assert text.count("model.layers.0.") == 4
    assert "model.layers.1." not in text, "one layer of a kind is enough"


def test_each_pattern_counts_by_itself() -> None:
    """Where `skip` comes first, `keep_8bit` is no typo for it."""
    options = QuantizationConfig(skip="*.o_proj, *.nothing", keep_8bit="*.self_attn.*,*.nix")
    first, second = unmatched(options, seen(0))
    assert "quantization.skip: '*.nothing'" in first
    assert "quantization.keep_8bit: '*.nix'" in second


@pytest.mark.parametrize(
    "options",
    [
        QuantizationConfig(),
        QuantizationConfig(skip="*.qkv_proj,*.k_proj,*.layers.0.mlp.up_proj"),
        QuantizationConfig(skip="lm_head", keep_8bit="*"),
    ],
)
def test_parts_and_whole_of_a_fused_layer_are_names(options: QuantizationConfig) -> None:
    assert unmatched(options, seen(0)) == []


def test_the_output_layer_is_not_for_keep_8bit() -> None:
    (text,) = unmatched(QuantizationConfig(keep_8bit="lm_head"), seen(0))
    assert "keep_8bit: 'lm_head' matches no layer" in text


def test_a_stage_of_a_pipeline_knows_that_others_have_layers() -> None:
    options = QuantizationConfig(skip="*.layers.0.*,*.layers.9.*,*.layers.4.mlp.down_porj")
    first, second = unmatched(options, seen(3, 4), layers=5)
    assert "'*.layers.9.*'" in first
    assert "Did you mean '*.layers.4.mlp.down_proj'?" in second


def test_names_that_may_be_matched_are_not_shown() -> None:
    options = QuantizationConfig(skip="*.experts,*.expert")
    (text,) = unmatched(options, seen(0), others=["layers.0.experts"])
    assert "'*.expert' matches" in text
    assert "experts" not in text
