"""Our kernel for quantized checkpoints, handed what vLLM's loaders make of three formats."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mixed_precision import MPLinearLayerConfig
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from scalellm_plugins import config
from scalellm_plugins.kernels import reference, registry
from scalellm_plugins.quantization import checkpoints, heap
from scalellm_plugins.quantization.checkpoints import (
    ScaleLLMInt8LinearKernel,
    ScaleLLMLinearKernel,
)

pytestmark = pytest.mark.vllm

CHANNELS, WIDTH, GROUP = 48, 128, 32


@pytest.fixture(autouse=True, scope="module")
def ops() -> None:
    registry.load_vllm_ops()
    if torch.cpu._is_amx_tile_supported() or registry.missing("int4"):
        pytest.skip("left to vLLM on this processor")


def asked(**other: Any) -> MPLinearLayerConfig:
    given = {
        "full_weight_shape": (WIDTH, CHANNELS),
        "partition_weight_shape": (WIDTH, CHANNELS),
        "weight_type": scalar_types.uint4b8,
        "act_type": torch.bfloat16,
        "group_size": GROUP,
        "zero_points": False,
    }
    return MPLinearLayerConfig(**given | other)


def packed(numbers: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Numbers below 2 ** bits in words of 32 bits along a dimension, the lowest first."""
    whole = numbers.movedim(dim, -1).to(torch.int64)
    whole = whole.reshape(*whole.shape[:-1], -1, 32 // bits)
    shifts = torch.arange(0, 32, bits)
    words = (whole << shifts).sum(-1)
    return words.to(torch.int32).movedim(-1, dim).contiguous()


def parameter(data: torch.Tensor, **attributes: Any) -> torch.nn.Parameter:
    made = torch.nn.Parameter(data, requires_grad=False)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize("form", ["compressed-tensors", "asymmetric", "gptq", "awq"])
def test_four_bits(form: str, group: int, dtype: torch.dtype) -> None:
    groups = 1 if group == -1 else WIDTH // group
    q = torch.randint(0, 16, (CHANNELS, WIDTH))
    scales = (torch.rand(CHANNELS, groups) + 0.5).to(dtype)
    zeros = torch.randint(0, 16, (CHANNELS, groups))
    has_zeros = form in ("asymmetric", "awq")
    zero = None
    if form in ("compressed-tensors", "asymmetric"):
        weight = parameter(packed(q, 4, 1), input_dim=1, output_dim=0, packed_dim=1)
        scale = parameter(scales.clone(), output_dim=0)
    else:
        weight = parameter(packed(q.t(), 4, 0), input_dim=0, output_dim=1, packed_dim=0)
        scale = parameter(scales.t().contiguous(), output_dim=1)
    if has_zeros:
        zero = parameter(packed(zeros, 4, 0), output_dim=0, packed_dim=0)
    elif form == "gptq":  # loaded, and without a meaning
        zero = parameter(torch.zeros(groups, CHANNELS // 8, dtype=torch.int32))
    bias = torch.randn(CHANNELS).to(dtype)
    layer = SimpleNamespace(w=weight, s=scale, z=zero, bias=parameter(bias))
    kind = scalar_types.uint4 if has_zeros else scalar_types.uint4b8
    wanted = asked(weight_type=kind, zero_points=has_zeros, act_type=dtype, group_size=group)
    assert ScaleLLMLinearKernel.can_implement(wanted) == (True, None)
    kernel = ScaleLLMLinearKernel(wanted, "w", "s", None if zero is None else "z")
    for _ in range(2):  # again: nothing
        kernel.process_weights_after_loading(layer)
    assert layer.w.numel() == layer.s.numel() == 0, "the checkpoint's tensors are let go"
    assert layer.z is None or layer.z.numel() == 0
    spread = WIDTH // groups
    offset = zeros.repeat_interleave(spread, 1) if has_zeros else 8
    exact = (q - offset).double() * scales.double().repeat_interleave(spread, 1)
    for shape in ((1, WIDTH), (7, WIDTH), (2, 5, WIDTH)):
        x = torch.randn(shape).to(dtype)
        rows = reference.quantized_rows(x.view(-1, WIDTH))
        for offset in (layer.bias, None):
            y = kernel.apply_weights(layer, x, offset)
            expected = reference.linear(rows, exact, None if offset is None else bias)
            assert y.shape == (*shape[:-1], CHANNELS)
            assert y.dtype == dtype
            error = (y.view(-1, CHANNELS).double() - expected).abs().max()
            assert error < 0.01 * expected.abs().max()


@pytest.mark.parametrize("group", [-1, GROUP])
def test_eight_bits(group: int) -> None:
    q = torch.randint(-127, 128, (CHANNELS, WIDTH))
    groups = 1 if group == -1 else WIDTH // group
    scales = (torch.rand(CHANNELS, groups) + 0.5).bfloat16()
    weight = parameter(packed(q + 128, 8, 1), input_dim=1, output_dim=0, packed_dim=1)
    layer = SimpleNamespace(w=weight, s=parameter(scales.clone(), output_dim=0), bias=None)
    wanted = asked(weight_type=scalar_types.uint8b128, group_size=group)
    assert ScaleLLMLinearKernel.can_implement(wanted) == (True, None)
    kernel = ScaleLLMLinearKernel(wanted, "w", "s")
    kernel.process_weights_after_loading(layer)
    x = torch.randn(5, WIDTH).bfloat16()
    exact = q.double() * scales.double().repeat_interleave(WIDTH // groups, 1)
    expected = reference.linear(reference.quantized_rows(x), exact, None)
    error = (kernel.apply_weights(layer, x).double() - expected).abs().max()
    assert error < 0.01 * expected.abs().max()


def test_w8a8(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randint(-127, 128, (CHANNELS, WIDTH), dtype=torch.int8)
    scales, bias = torch.rand(CHANNELS, 1) + 0.5, torch.randn(CHANNELS).bfloat16()
    layer = SimpleNamespace(weight=parameter(q.clone()), weight_scale=parameter(scales.clone()))
    layer.bias = parameter(bias)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    kernel = linear.init_int8_linear_kernel(True, False, True, "test")
    assert not isinstance(kernel, ScaleLLMInt8LinearKernel), "not offered yet"
    monkeypatch.setattr(linear, "_POSSIBLE_KERNELS", {PlatformEnum.CPU: []})
    lists = {PlatformEnum.CPU: list(linear._POSSIBLE_INT8_KERNELS[PlatformEnum.CPU])}
    monkeypatch.setattr(linear, "_POSSIBLE_INT8_KERNELS", lists)
    checkpoints.offer()
    kernel = linear.init_int8_linear_kernel(True, False, True, "test")
    assert isinstance(kernel, ScaleLLMInt8LinearKernel)
    for _ in range(2):
        kernel.process_weights_after_loading(layer)
    assert layer.weight.numel() == 0
    x = torch.randn(2, 5, WIDTH).bfloat16()
    rows = reference.quantized_rows(x.view(-1, WIDTH))
    expected = reference.linear(rows, q.double() * scales.double(), bias)
    y = kernel.apply_weights(layer, x, layer.bias)
    error = (y.view(-1, CHANNELS).double() - expected).abs().max()
    assert error < 0.01 * expected.abs().max()
    for asked_for in ((False, False, True), (True, True, True), (True, False, False)):
        other = linear.init_int8_linear_kernel(*asked_for, "test")
        assert not isinstance(other, ScaleLLMInt8LinearKernel)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"group_size": 48}, "groups of 48 of 128 inputs"),
        ({"act_type": torch.float32}, "rows of torch.float32"),
        ({"out_type": torch.float32}, "results of torch.float32"),
        ({"zero_points": True}, "weights of type"),  # and not those of that type
        ({"weight_type": scalar_types.uint4}, "weights of type"),  # AWQ without zeros
        ({"weight_type": scalar_types.uint8b128, "group_size": 48}, "groups of 48"),
    ],
)
def test_what_is_left_to_vllm(other: dict[str, Any], why: str) -> None:
    possible, said = ScaleLLMLinearKernel.can_implement(asked(**other))
    assert not possible
    assert why in str(said)


def test_rows_of_16_bits_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    assert "VLLM_CPU_INT4_W4A8=0" in str(ScaleLLMLinearKernel.can_implement(asked())[1])


def test_weights_in_an_order_of_their_own() -> None:
    """As vLLM 0.29 still says it of GPTQ's."""
    wanted = asked()
    wanted.has_g_idx = True
    assert "act-order" in str(ScaleLLMLinearKernel.can_implement(wanted)[1])


def test_where_there_is_amx_vllm_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert "AMX" in str(ScaleLLMLinearKernel.can_implement(asked())[1])
    assert not ScaleLLMInt8LinearKernel.is_supported()[0]


def test_w8a8_of_a_model_in_32_bits_is_left_to_vllm() -> None:
    said = SimpleNamespace(is_channelwise=True, is_static_input_scheme=False, input_symmetric=True)
    assert ScaleLLMInt8LinearKernel.can_implement(said) == (False, "rows of torch.float32")


def test_freed_memory_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large layers: the call takes milliseconds."""
    trims: list[None] = []
    monkeypatch.setattr(heap, "trim", lambda: trims.append(None))
    for width, expected in ((64, 0), (heap.SMALLEST // 64, 1)):
        weight = torch.zeros(64, width, dtype=torch.int8)
        layer = SimpleNamespace(w=parameter(weight))
        kernel = registry.int8(weight, torch.ones(64), torch.bfloat16)
        checkpoints._keep(layer, kernel, layer.w)
        assert layer.w.numel() == 0
        assert len(trims) == expected


def test_it_comes_first_unless_an_option_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    listed, listed8 = [object], [object]
    monkeypatch.setitem(linear._POSSIBLE_KERNELS, PlatformEnum.CPU, listed)
    monkeypatch.setitem(linear._POSSIBLE_INT8_KERNELS, PlatformEnum.CPU, listed8)
    without = config.parse({"quantization": {"checkpoints": False}})
    monkeypatch.setattr(config, "current", lambda: without)
    checkpoints.offer()
    assert listed == listed8 == [object]
    monkeypatch.setattr(config, "current", config.Config)
    for _ in range(2):
        checkpoints.offer()
        assert listed == [ScaleLLMLinearKernel, object]
        assert listed8 == [ScaleLLMInt8LinearKernel, object]
