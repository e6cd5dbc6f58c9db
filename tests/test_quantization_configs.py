"""The names in vLLM's registry, and layers through vLLM's interface, without a server."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scalellm_plugins.config import QuantizationConfig
from scalellm_plugins.errors import ConfigError
from scalellm_plugins.kernels import reference, registry
from scalellm_plugins.quantization import rules, weights

pytestmark = pytest.mark.vllm


@pytest.fixture
def configs(clean_environment: pytest.MonkeyPatch) -> Any:
    from scalellm_plugins.quantization import configs

    configs.register()
    return configs


@pytest.mark.parametrize("method", rules.METHODS)
def test_a_name_finds_its_method(configs: Any, method: str) -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    found = get_quantization_config(method)
    configs.register()
    assert get_quantization_config(method) is found
    assert found.get_name() == method
    assert found.get_config_filenames() == []
    assert pickle.loads(pickle.dumps(found())).method == method


def test_only_linear_layers_are_touched(configs: Any) -> None:
    class RoutedExperts(torch.nn.Module):
        """By name, as vLLM's."""

    method = configs.Int4Config()
    assert method.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.experts is a mixture"):
        method.get_quant_method(RoutedExperts(), "model.layers.0.mlp.experts")


def linear() -> torch.nn.Module:
    """A layer that is linear by its kind, as vLLM's are."""
    from vllm.model_executor.layers.linear import LinearBase

    class Linear(LinearBase):  # type: ignore[misc]
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.input_size = self.output_size = 256

    return Linear()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"no GPU has run them yet\. To try them: --scalellm\.quantization\.gpu"),
        ({"gpu": True}, r"scalellm_int4: Triton is not installed\."),
    ],
)
def test_a_gpu_must_be_asked_for(
    configs: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool], said: str
) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    method = configs.Int4Config()
    method._options = QuantizationConfig(**options)
    with pytest.raises(ConfigError, match=said):
        method.get_quant_method(linear(), "model.layers.0.mlp.down_proj")


def ops(*lists: tuple[str, ...]) -> SimpleNamespace:
    """What vLLM's build for some processor registers."""
    return SimpleNamespace(_C=SimpleNamespace(**dict.fromkeys(chain(*lists), None)))


@pytest.mark.parametrize(
    ("built", "method", "said"),
    [
        (
            (registry._NEEDS["int8"],),  # that for AVX512 without bf16
            "Int4Config",
            r"lack int4_scaled_mm_cpu, .* 8 bits work here: --quantization scalellm_int8\.$",
        ),
        ((registry._NEEDS["int8"],), "Int8Config", ""),
        ((), "Int4Config", r"lack int4_scaled_mm_cpu, int8_scaled_mm_with_quant\. Drop it\.$"),
        ((), "Int8Config", r"lack create_onednn_scaled_mm_handler, .* Drop it\.$"),
    ],
)
def test_a_refusal_names_what_works(
    configs: Any, monkeypatch: pytest.MonkeyPatch, built: Any, method: str, said: str
) -> None:
    monkeypatch.setattr(torch, "ops", ops(*built))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(registry, "load_vllm_ops", lambda: None)
    made = getattr(configs, method)()
    with pytest.raises(ConfigError, match=said) if said else nullcontext():
        assert made.get_quant_method(linear(), "model.layers.0.mlp.down_proj")


def test_a_checkpoint_that_is_quantized_already(configs: Any) -> None:
    with pytest.raises(ConfigError, match=r"quantized already \('awq'\)"):
        configs.Int4Config.from_config({"quant_method": "awq"})


class Layer(torch.nn.Module):
    """As much of a linear layer as the method touches, with weights that are there."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_layer_is_packed_once_and_its_weight_freed(bits: Any, with_bias: bool) -> None:
    registry.load_vllm_ops()
    if why := registry.missing("int4" if bits == 4 else "int8"):
        pytest.skip(why)
    from scalellm_plugins.quantization.methods import QuantizedLinear

    method = QuantizedLinear(rules.Plan(bits, 64), QuantizationConfig())
    weight = torch.randn(96, 128).bfloat16()
    layer = Layer(weight.clone(), torch.randn(96).bfloat16() if with_bias else None)
    method.process_weights_after_loading(layer)
    method.process_weights_after_loading(layer)
    assert layer.weight.numel() == 0
    assert layer.weight.dtype == torch.bfloat16
    if bits == 4:
        four = weights.to_int4(weight, 64)
        known = reference.int4_weight(four.q, four.zeros, four.multipliers, four.steps)
    else:
        eight = weights.to_int8(weight)
        known = reference.int8_weight(eight.q, eight.scales)
    x = torch.randn(2, 3, 128).bfloat16()
    y = method.apply(layer, x, layer.bias)
    assert y.shape == (2, 3, 96)
    rows = reference.quantized_rows(x.view(6, 128))
    expected = reference.linear(rows, known, layer.bias)
    assert (y.view(6, 96) - expected).abs().max() < 0.01 * expected.abs().max()
