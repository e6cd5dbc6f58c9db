"""How weights are rounded, which layers are, and what is refused. No vLLM."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins import config
from scalellm_plugins.config import QuantizationConfig
from scalellm_plugins.errors import ConfigError
from scalellm_plugins.kernels import int4_tiles, int8_tiles, reference, registry
from scalellm_plugins.quantization import asked, rules, weights

QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
OPTIONS = QuantizationConfig()


def four_bits(weight: torch.Tensor, group: int, **options: bool) -> torch.Tensor:
    four = weights.to_int4(weight, group, **options)
    return reference.int4_weight(four.q, four.zeros, four.multipliers, four.steps)


def loss(weight: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((weight.double() - rounded).square().sum())


# ---- Rounding ---------------------------------------------------------------------------------


def test_eight_bits_err_by_half_a_step() -> None:
    weight = torch.randn(40, 96)
    weight[7] = 0
    eight = weights.to_int8(weight)
    steps = weight.abs().amax(dim=1) / 127
    error = (reference.int8_weight(eight.q, eight.scales) - weight).abs()
    assert (error <= steps[:, None] * 0.503).all()
    assert (reference.int8_weight(eight.q, eight.scales)[7] == 0).all()


@given(st.integers(0, 2**31), st.sampled_from([32, 64, 96]), st.booleans(), st.booleans())
def test_four_bits_are_eight_bits_too(seed: int, group: int, symmetric: bool, search: bool) -> None:
    """Whatever the weights: outliers, one sign only, groups of zeros."""
    dice = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, group * 3, generator=dice)
    weight *= torch.rand(5, 1, generator=dice).mul(12).exp()
    weight[1, 3] *= 100
    weight[2].abs_()
    weight[3, :group] = 0
    four = weights.to_int4(weight, group, symmetric=symmetric, search=search)
    whole = reference.int4_weight(four.q, four.zeros, four.multipliers, torch.ones(5))
    assert four.q.max() <= 15
    assert (four.multipliers >= 1).all()
    assert whole.abs().max() <= 127
    assert symmetric <= bool((four.zeros == 8).all())
    assert (whole[3, :group] == 0).all(), "zeros stay zeros"


def test_the_search_and_the_zero_make_the_error_less() -> None:
    weight = torch.randn(64, 1024)
    plain = loss(weight, four_bits(weight, 128, search=False))
    assert loss(weight, four_bits(weight, 128)) < 0.95 * plain
    skewed = weight + 1
    both = [loss(skewed, four_bits(skewed, 128, symmetric=value)) for value in (True, False)]
    assert both[1] < 0.8 * both[0]


def test_smaller_groups_err_less() -> None:
    weight = torch.randn(64, 1024) * torch.rand(1, 1024).mul(3).exp()
    losses = [loss(weight, four_bits(weight, group)) for group in (32, 128, 512)]
    assert losses == sorted(losses)


@pytest.mark.parametrize(
    ("width", "wanted", "group"),
    [
        (4096, 128, 128),
        (256, 128, 128),
        (96, 128, 96),
        (160, 128, 32),
        (896, 128, 128),
        (4864, 128, 128),
        (2880, 128, 96),
        (512, 300, 256),
        (100, 128, 0),
    ],
)
def test_the_group_that_fits(width: int, wanted: int, group: int) -> None:
    """512 inputs and 300 wanted: 256, as more than 128 goes by whole blocks of the kernel."""
    assert weights.group_for(width, wanted) == group


# ---- Which layers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("scalellm_int8", OPTIONS, (8, 0)),
        ("scalellm_w8a8", OPTIONS, (8, 0)),
        ("scalellm_int4", OPTIONS, (4, 128)),
        ("scalellm_int4", QuantizationConfig(group_size=64), (4, 64)),
        ("scalellm_int4", QuantizationConfig(keep_8bit="*.o_proj, *.k_proj"), (8, 0)),
        ("scalellm_int4", QuantizationConfig(skip="model.layers.0.*"), (16, 0)),
        ("scalellm_int4", QuantizationConfig(skip="*.qkv_proj", keep_8bit="*"), (16, 0)),
        ("scalellm_int4", QuantizationConfig(skip="layers.0", keep_8bit="*.down"), (4, 128)),
    ],
)
def test_rules(
    method: asked.Method, options: QuantizationConfig, expected: tuple[int, int]
) -> None:
    """The checkpoint's name of a fused layer's part counts for all of it."""
    names = rules.names_of("model.layers.0.self_attn.qkv_proj", QKV)
    assert names[2] == "model.layers.0.self_attn.k_proj"
    found = rules.plan(method, options, names, 512, 256)
    assert (found.bits, found.group) == expected


def test_a_shape_that_four_bits_do_not_take_gets_eight() -> None:
    found = rules.plan("scalellm_int4", OPTIONS, ["a.b"], 64, 100)
    assert found.bits == 8
    assert "100 inputs" in found.why


def test_experts_are_refused_by_name_or_skipped() -> None:
    with pytest.raises(ConfigError, match=r"layers\.3\.mlp\.experts is a mixture") as error:
        rules.refuse_experts("scalellm_int4", OPTIONS, "model.layers.3.mlp.experts")
    assert "--scalellm.quantization.skip '*.experts'" in str(error.value)
    skipped = QuantizationConfig(skip="*.experts")
    rules.refuse_experts("scalellm_int4", skipped, "model.layers.3.mlp.experts")


def test_experts_are_refused_early_where_no_pattern_can_mean_them() -> None:
    for skip in (None, "*.o_proj"):
        options = QuantizationConfig(skip=skip)
        with pytest.raises(ConfigError, match="int4: /models/moe is a mixture of") as error:
            rules.refuse_experts_early("scalellm_int4", options, "/models/moe")
        assert "--scalellm.quantization.skip '*.experts'" in str(error.value)
    for skip in ("*.experts", "*.mlp.*"):
        rules.refuse_experts_early("scalellm_int4", QuantizationConfig(skip=skip), "/models/moe")


def test_an_output_layer_that_is_to_be_left_alone_is() -> None:
    assert rules.head_plan("scalellm_int4", OPTIONS, "lm_head").bits == 8
    skipped = QuantizationConfig(skip="lm_head", lm_head_8bit=True)
    assert rules.head_plan("scalellm_int4", skipped, "lm_head").bits == 16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"group_size": 100}, "scalellm.quantization.group_size: 100"),
        ({"group_size": 0}, "scalellm.quantization.group_size: 0"),
        ({"search": "best"}, "scalellm.quantization.search: 'best'"),
        ({"groupsize": 64}, "Valid under scalellm.quantization: group_size"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match="quantization") as error:
        config.parse({"quantization": options})
    assert said in str(error.value)


def test_devices_without_kernels_are_named() -> None:
    assert "'xpu'" in registry.missing("int4", "xpu")
    assert registry.missing("int4", "cuda") == "Triton is not installed"


def test_what_a_processor_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (int4_tiles, int8_tiles):
        monkeypatch.setattr(module, "best", lambda: None)
    assert "AVX2 and F16C" in registry.missing("int4")
    monkeypatch.setattr(registry, "_ONEDNN", ())
    assert registry.missing("int8") == "", "oneDNN stands in"
    monkeypatch.setattr(registry, "_ONEDNN", ("an_op_of_another_build",))
    assert "lack an_op_of_another_build" in registry.missing("int8")
