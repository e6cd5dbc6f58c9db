"""Linear layers by vLLM's ops against the oracle: shapes, rows, memory, what is not a number."""

from __future__ import annotations

import gc

import pytest
import torch

from scalellm_plugins.kernels import int8_code, int8_packed, int8_tiles, reference, registry
from scalellm_plugins.kernels.int4_packed import Int4Packed
from scalellm_plugins.kernels.int8_linear import Int8Linear
from scalellm_plugins.kernels.int8_packed import Int8Packed
from scalellm_plugins.kernels.int8_tiles import Int8Tiles
from scalellm_plugins.quantization import weights

from .kernel_parts import error

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True, scope="module")
def ops() -> None:
    registry.load_vllm_ops()
    if why := registry.missing("int8"):
        pytest.skip(why)


def made(
    channels: int, width: int, dtype: torch.dtype = torch.bfloat16, way: str = "onednn"
) -> tuple[registry.Kernel, torch.Tensor]:
    """A kernel, and the weight that it stands for."""
    eight = weights.to_int8(torch.randn(channels, width).to(dtype))
    weight = reference.int8_weight(eight.q, eight.scales)
    if way == "onednn":
        return Int8Linear(eight.q, eight.scales, dtype), weight
    if not int8_packed.fits(eight.q, dtype):
        pytest.skip("vLLM's ops for this processor lack it")
    return Int8Packed(eight.q, eight.scales), weight


each = pytest.mark.parametrize("way", ["onednn", "packed"])


def check(kernel: registry.Kernel, weight: torch.Tensor, dtype: torch.dtype) -> None:
    channels, width = weight.shape
    bias = torch.randn(channels)
    for rows in (1, 2, 5, 33, 130):
        x = torch.randn(rows, width).to(dtype)
        assert error(kernel(x, bias), x, weight, bias) < 0.01
        assert error(kernel(x), x, weight, None) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "width"), [(96, 256), (33, 96), (7, 5), (1, 1), (130, 160)])
def test_it_is_the_product(channels: int, width: int, dtype: torch.dtype) -> None:
    check(*made(channels, width, dtype), dtype)


@pytest.mark.parametrize(("channels", "width"), [(96, 256), (32, 32), (1152, 896)])
def test_the_packed_one_is_too(channels: int, width: int) -> None:
    check(*made(channels, width, way="packed"), torch.bfloat16)


def test_each_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's packed op ends the process with float16, and with channels that fill no block."""
    eight = weights.to_int8(torch.randn(64, 96))
    assert not int8_packed.fits(eight.q, torch.float16)
    assert not int8_packed.fits(eight.q[:33], torch.bfloat16)
    assert not int8_packed.fits(eight.q[:, :40], torch.bfloat16)
    assert isinstance(registry.int8(eight.q, eight.scales, torch.bfloat16), Int8Packed)
    for tiling, kind in ((int8_code.WIDE, Int8Tiles), (None, Int8Linear)):
        monkeypatch.setattr(int8_tiles, "best", lambda tiling=tiling: tiling)
        assert isinstance(registry.int8(eight.q, eight.scales, torch.float16), kind)
        assert isinstance(registry.int8(eight.q[:33], eight.scales[:33], torch.bfloat16), kind)
    large = weights.to_int8(torch.randn(1024, 512))
    assert isinstance(registry.int8(large.q, large.scales, torch.bfloat16), Int8Packed)
    monkeypatch.setattr(int8_tiles, "best", lambda: int8_code.WIDE)
    assert isinstance(registry.int8(large.q, large.scales, torch.bfloat16), Int8Tiles)


@each
def test_a_row_of_zeros_is_the_bias(way: str) -> None:
    kernel, _ = made(64, 96, way=way)
    x = torch.randn(5, 96).bfloat16()
    x[3] = 0
    bias = torch.randn(64)
    assert torch.equal(kernel(x, bias)[3], bias.bfloat16())
    assert torch.equal(kernel(torch.zeros(1, 96).bfloat16())[0], torch.zeros(64).bfloat16())


@each
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float, way: str) -> None:
    kernel, _ = made(64, 96, way=way)
    x = torch.randn(6, 96).bfloat16()
    good = kernel(x)
    x[2, 5] = bad
    assert torch.equal(kernel(x)[[0, 1, 3, 4, 5]], good[[0, 1, 3, 4, 5]])


def test_the_kernel_owns_what_it_needs() -> None:
    """oneDNN points to the scales: freed, they turned a served model's words into noise."""
    kernel, weight = made(512, 256)
    gc.collect()
    junk = [torch.full((512, 1), 1e9) for _ in range(64)]
    x = torch.randn(3, 256).bfloat16()
    assert error(kernel(x), x, weight, None) < 0.01
    assert junk


@each
def test_rows_that_are_not_contiguous(way: str) -> None:
    kernel, _ = made(64, 96, way=way)
    wide = torch.randn(4, 192).bfloat16()
    assert torch.equal(kernel(wide[:, ::2]), kernel(wide[:, ::2].contiguous()))


@each
def test_torch_compile_sees_one_op(way: str) -> None:
    """The number of rows is not baked into what it compiles."""
    kernel, _ = made(64, 96, way=way)
    bias = torch.randn(64)
    compiled = torch.compile(lambda x: kernel(x, bias) * 2, fullgraph=True, backend="aot_eager")
    for rows in (3, 40):
        x = torch.randn(rows, 96).bfloat16()
        assert torch.equal(compiled(x), kernel(x, bias) * 2)


@pytest.mark.parametrize("width", [256, 1024])
def test_made_while_the_default_dtype_is_the_models(width: int) -> None:
    """As vLLM does it while it loads: 32-bit numbers must be asked for as such."""
    eight = weights.to_int8(torch.randn(2048, width))
    x = torch.randn(3, width).bfloat16()
    expected = reference.linear(
        reference.quantized_rows(x), reference.int8_weight(eight.q, eight.scales), None
    )
    four = weights.to_int4(torch.randn(2048, width), 128)
    parts = (four.q, four.zeros, four.multipliers, four.steps)
    rows = reference.quantized_rows(x)
    expected_four = reference.linear(rows, reference.int4_weight(*parts), None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = weights.to_int8(torch.randn(4, width, dtype=torch.float32))
        assert again.scales.dtype == torch.float32
        kernel = registry.int8(eight.q, eight.scales, torch.bfloat16)
        y, y_four = kernel(x), registry.int4(*parts)(x)
    finally:
        torch.set_default_dtype(before)
    assert (y.double() - expected).abs().max() < 0.01 * expected.abs().max()
    assert (y_four.double() - expected_four).abs().max() < 0.02 * expected_four.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("channels", "width", "group"),
    [(96, 256, 64), (33, 96, 96), (130, 160, 32), (64, 512, 256), (1, 128, 128)],
)
def test_four_bits(channels: int, width: int, group: int, dtype: torch.dtype) -> None:
    if not hasattr(torch.ops._C, "int4_scaled_mm_cpu"):
        pytest.skip("vLLM's ops for this processor lack it")
    four = weights.to_int4(torch.randn(channels, width), group)
    scales = four.multipliers * four.steps[:, None]
    kernel = Int4Packed(four.q, four.zeros, scales)
    weight = reference.int4_weight(four.q, four.zeros, four.multipliers, four.steps)
    bias = torch.randn(channels)
    for rows in (1, 4, 7, 33):
        x = torch.randn(rows, width).to(dtype)
        for offset in (bias, None):
            y = kernel(x, offset)
            assert y.shape == (rows, channels)
            assert error(y, x, weight, offset) < 0.01


def test_they_are_chosen_where_there_is_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its matrix units multiply more than vectors do. (Feigned: what is made is not multiplied.)"""
    if not hasattr(torch.ops._C, "int4_scaled_mm_cpu"):
        pytest.skip("vLLM's ops for this processor lack it")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    eight = weights.to_int8(torch.randn(1024, 1024))
    assert isinstance(registry.int8(eight.q, eight.scales, torch.bfloat16), Int8Packed)
    assert isinstance(registry.int8(eight.q, eight.scales, torch.float16), Int8Linear)
    four = weights.to_int4(torch.randn(32, 64), 32)
    kernel = registry.int4(four.q, four.zeros, four.multipliers, four.steps)
    assert isinstance(kernel, Int4Packed)
