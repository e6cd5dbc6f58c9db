"""What a command line may ask of online quantization. No vLLM, no torch."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from scalellm_plugins.config import QuantizationConfig
from scalellm_plugins.errors import ConfigError
from scalellm_plugins.quantization import asked


def test_methods_are_ours_of_the_model_and_of_its_draft() -> None:
    assert asked.methods(argparse.Namespace()) == ()
    assert asked.methods(argparse.Namespace(quantization="awq", speculative_config=None)) == ()
    draft = {"model": "small", "quantization": "scalellm_int8"}
    line = argparse.Namespace(quantization="scalellm_int4", speculative_config=draft)
    assert set(asked.methods(line)) == {"scalellm_int4", "scalellm_int8"}


@pytest.mark.parametrize(
    ("why", "by_choice", "said"),
    [
        (None, True, "Add --plugins scalellm (or VLLM_PLUGINS=scalellm)."),
        ("not asked for", True, "Switch it on with --scalellm.quantization on"),
        ("--scalellm.quantization off", True, "off (--scalellm.quantization off). Switch it on"),
        ("--scalellm off", True, "Drop --scalellm off"),
        ("x.Y: expected a class", False, "off (x.Y: expected a class). Drop --quantization, or"),
    ],
)
def test_a_method_without_the_feature_is_refused(
    why: str | None, by_choice: bool, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        asked.refuse_off(("scalellm_int4",), why, by_choice=by_choice)
    assert said in str(error.value)
    assert "argument --quantization: 'scalellm_int4'" in str(error.value)
    asked.refuse_off((), why, by_choice=by_choice)


@pytest.mark.parametrize(
    ("methods", "options", "said"),
    [
        (["scalellm_int8"], {"keep_8bit": "*.o_proj"}, "keep_8bit: '*.o_proj' has no effect with"),
        (["scalellm_w8a8"], {"group-size": 128}, "group_size: 128 has no effect with"),
        (["scalellm_int8"], {"zero_point": "symmetric"}, "take --quantization scalellm_int4."),
        ([], {"skip": "*.o_proj"}, "skip: '*.o_proj' has no effect without --quantization, only"),
        ([], {"lm_head_8bit": True}, "only with scalellm_int8, scalellm_w8a8, scalellm_int4."),
        # What acts, and what asks for nothing.
        (["scalellm_int4"], {"keep_8bit": "*", "group_size": 64, "search": "none"}, ""),
        (["scalellm_w8a8", "scalellm_int4"], {"keep_8bit": "*"}, ""),
        (["scalellm_int8"], {"skip": "*.o_proj", "lm_head_8bit": True}, ""),
        (["scalellm_int8"], {"keep_8bit": None}, ""),
        ([], {"lm_head_8bit": False, "checkpoints": False, "gpu": True}, ""),
    ],
)
def test_options_without_effect(methods: list[Any], options: dict[str, Any], said: str) -> None:
    found = asked.without_effect(methods, {"quantization": options, "ipc": "off"})
    assert said in found
    assert bool(said) == bool(found)


def test_a_bare_switch_has_no_options() -> None:
    assert asked.without_effect([], {"quantization": "on"}) == ""


def test_options_that_are_judged_exist() -> None:
    """Renamed, one would be ignored in silence again."""
    names = {field.name for field in msgspec.structs.fields(QuantizationConfig)}
    assert set(asked._ACTS_WITH) <= names


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_experts": 64}, True),
        ({"n_routed_experts": 256}, True),
        ({"num_local_experts": 0}, False),
        ({"num_local_experts": 1}, False),
        ({"num_experts": None, "hidden_size": 64}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_experts_are_told_by_config_json(
    fields: dict[str, Any], expected: bool, nested: bool
) -> None:
    """A model that sees has its language model's numbers one level below."""
    inner = SimpleNamespace(**fields)
    outer = SimpleNamespace(get_text_config=lambda: inner) if nested else inner
    assert asked.has_experts(outer) is expected
    assert not asked.has_experts(None)


def test_which_patterns_may_name_experts() -> None:
    for glob in ("*.experts", "*", "*.mlp.*", "model.layers.1.mlp.experts", "*.layers.[0-3]"):
        assert asked.may_name_experts([glob]), glob
    assert not asked.may_name_experts(["*.o_proj", "*.mlp"])
