"""The names in vLLM's registry, and layers through vLLM's interface, without a server."""

from __future__ import annotations

import json
import pickle
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scalellm_plugins.config import QuantizationConfig
from scalellm_plugins.errors import ConfigError
from scalellm_plugins.kernels import int4_tiles, int8_tiles, reference, registry
from scalellm_plugins.quantization import asked, rules, weights

pytestmark = pytest.mark.vllm

DEMO = Path(__file__).parents[1] / "examples" / "demo_model"


@pytest.fixture
def configs(clean_environment: pytest.MonkeyPatch) -> Any:
    from scalellm_plugins.quantization import configs

    configs.register()
    return configs


@pytest.mark.parametrize("method", asked.METHODS)
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


@pytest.mark.parametrize(
    ("built", "method", "said"),
    [
        (registry._ONEDNN, "Int4Config", r"8 bits work here: --quantization scalellm_int8\.$"),
        (registry._ONEDNN, "Int8Config", ""),
        ((), "Int4Config", r"int4: our kernels need a processor with AVX2 .* Drop it\.$"),
        ((), "Int8Config", r"lack create_onednn_scaled_mm_handler, .* Drop it\.$"),
    ],
)
def test_a_refusal_names_what_works(
    configs: Any, monkeypatch: pytest.MonkeyPatch, built: Any, method: str, said: str
) -> None:
    """On a processor that our own kernels have no way for, with some of vLLM's ops."""
    for tiles in (int4_tiles, int8_tiles):
        monkeypatch.setattr(tiles, "best", lambda: None)
    monkeypatch.setattr(torch, "ops", SimpleNamespace(_C=SimpleNamespace(**dict.fromkeys(built))))
    monkeypatch.setattr(registry, "load_vllm_ops", lambda: None)
    made = getattr(configs, method)()
    with pytest.raises(ConfigError, match=said) if said else nullcontext():
        assert made.get_quant_method(linear(), "model.layers.0.mlp.down_proj")


def test_a_checkpoint_that_is_quantized_already(configs: Any) -> None:
    with pytest.raises(ConfigError, match=r"quantized already \('awq'\)"):
        configs.Int4Config.from_config({"quant_method": "awq"})


# ---- Patterns against the layers of a model ---------------------------------------------------

RIGHT, WRONG = "*.down_proj", "*.down_porj"


def made(configs: Any, method: str, **options: str) -> Any:
    """A config that a model of two layers was made with, and a layer of it."""
    config = getattr(configs, method)()
    config._options = QuantizationConfig(**options)
    layers = [
        config.get_quant_method(linear(), f"model.layers.0.x.{name}")
        for name in ("o_proj", "down_proj")
    ]
    return config, layers[1]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are some."""
    monkeypatch.setattr(registry, "load_vllm_ops", lambda: None)
    monkeypatch.setattr(registry, "missing", lambda *_: "")


@pytest.fixture
def warnings(configs: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged as such."""
    said: list[str] = []
    monkeypatch.setattr(configs.logger, "warning", lambda text, *rest: said.append(text % rest))
    return said


def current(config: Any, **fields: Any) -> SimpleNamespace:
    """As much of vLLM's config, while a model is made with ours, as is asked."""
    kind = fields.pop("runner_type", "generate")
    model = SimpleNamespace(runner_type=kind, get_total_num_hidden_layers=lambda: 4)
    parts = {"quant_config": config, "speculative_config": None, "model_config": model}
    parallel = SimpleNamespace(pipeline_parallel_size=fields.pop("stages", 1))
    return SimpleNamespace(**{**parts, "parallel_config": parallel, **fields})


@pytest.mark.parametrize("option", ["skip", "keep_8bit"])
def test_the_first_layer_that_is_packed_refuses_patterns_for_nothing(
    configs: Any, kernels: None, option: str
) -> None:
    config, layer = made(configs, "Int4Config", **{option: f"*.o_proj,{WRONG}"})
    with pytest.raises(ConfigError, match=rf"{option}: '\*\.down_porj' .* mean '\*\.down_proj'"):
        layer.process_weights_after_loading(Layer(torch.zeros(0), None))
    config.model_is_made()  # told once: what comes later is a reload
    config, layer = made(configs, "Int4Config", **{option: "*.o_proj"})
    layer.process_weights_after_loading(Layer(torch.zeros(0), None))


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        ({"stages": 2}, "down_porj' matches no layer .*this stage of the pipeline"),
        ({"speculative_config": {}}, "down_porj' matches no layer .*the draft's layers"),
        ({"runner_type": "draft"}, ""),
        ({"quant_config": None}, ""),  # the draft's own
    ],
)
def test_where_not_all_layers_are_here_patterns_for_nothing_are_a_warning(
    configs: Any,
    kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
    fields: dict[str, Any],
    warned: str,
) -> None:
    import vllm.config

    config = configs.Int4Config()
    config._options = QuantizationConfig(skip=f"{WRONG},*.layers.0.*")
    now = current(config, **fields)
    monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", lambda: now)
    config.get_quant_method(linear(), "model.layers.3.mlp.down_proj")
    config.model_is_made()
    found = [text for text in warnings if "matches no layer" in text]
    assert all(WRONG in text or fields != {"stages": 2} for text in found), "others may have 0"
    assert any(re.search(warned, text) for text in found) if warned else not found


def test_a_pattern_for_experts_may_stand_where_config_json_asked_for_it(
    configs: Any, kernels: None
) -> None:
    config, _ = made(configs, "Int4Config", skip="*.experts")
    with pytest.raises(ConfigError, match="experts' matches no layer"):
        config.model_is_made()
    config, _ = made(configs, "Int4Config", skip="*.experts")
    config.maybe_update_config("/models/moe", hf_config=SimpleNamespace(num_experts=8))
    config.model_is_made()


def test_an_option_for_another_method_is_said_once_and_its_patterns_are_not_looked_at(
    configs: Any, kernels: None, clean_environment: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    """As in Python, where no command line refused it."""
    clean_environment.setenv("SCALELLM_CONFIG", json.dumps({"quantization": {"keep_8bit": WRONG}}))
    config, _ = made(configs, "Int8Config", keep_8bit=WRONG)
    config.model_is_made()
    (text,) = warnings
    assert f"keep_8bit: '{WRONG}' has no effect with --quantization scalellm_int8" in text


def test_experts_are_refused_before_an_engine_starts(
    configs: Any, clean_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By what vLLM makes of a config.json; no tensor is read."""
    from vllm.engine.arg_utils import EngineArgs

    fields = json.loads((DEMO / "config.json").read_text())
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    fields |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **experts}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    arguments = {
        "model": str(tmp_path),
        "tokenizer": str(DEMO),
        "quantization": "scalellm_int4",
        "max_model_len": 1024,
    }
    with pytest.raises(ValueError, match=f"{tmp_path} is a mixture of experts"):
        EngineArgs(**arguments).create_engine_config()
    clean_environment.setenv("SCALELLM_CONFIG", '{"quantization": {"skip": "*.experts"}}')
    made = EngineArgs(**arguments).create_engine_config()
    assert isinstance(made.quant_config, configs.Int4Config)


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
