"""The products for processors without AVX512, compiled for this one and for such a one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from scalellm_plugins.kernels import int4_pairs, int8_pairs, int8_tiles, native, reference, registry
from scalellm_plugins.kernels.int4_linear import Int4Linear
from scalellm_plugins.kernels.int4_pairs import Int4Pairs
from scalellm_plugins.kernels.int8_pairs import Int8Pairs
from scalellm_plugins.quantization import weights

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
BITS = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture(scope="module", params=[(), ("avx512", "avxvnni")], ids=["host", "avx2"])
def features(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiled with all that this processor has, and without what older ones lack."""
    before, native.LEFT_OUT = native.LEFT_OUT, request.param
    for module in (int4_pairs, int8_pairs):
        module._compiled.cache_clear()
        module.available.cache_clear()
    if not int8_pairs.available():
        pytest.skip("this processor has no AVX2")
    yield
    native.LEFT_OUT = before
    for module in (int4_pairs, int8_pairs):
        module._compiled.cache_clear()
        module.available.cache_clear()


pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("features")]


def made(
    bits: int, channels: int, width: int, group: int = 32
) -> tuple[registry.Kernel, torch.Tensor]:
    """A kernel, and the weight that it stands for."""
    weight = torch.randn(channels, width)
    if bits == 8:
        eight = weights.to_int8(weight)
        return Int8Pairs(eight.q, eight.scales), reference.int8_weight(eight.q, eight.scales)
    four = weights.to_int4(weight, group)
    parts = (four.q, four.zeros, four.multipliers, four.steps)
    return Int4Pairs(*parts), reference.int4_weight(*parts)


def check(kernel: registry.Kernel, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """Every size of a tile, alone and one after another."""
    channels, width = weight.shape
    bias = torch.randn(channels)
    for rows in (*range(1, 10), 33, 49, 130):
        x = torch.randn(rows, width).to(dtype)
        exact = reference.quantized_rows(x)
        for offset in (bias, None):
            y, expected = kernel(x, offset), reference.linear(exact, weight, offset)
            assert y.shape == (rows, channels)
            assert y.dtype == dtype
            assert (y.double() - expected).abs().max() < 0.01 * expected.abs().max()


@DTYPES
@pytest.mark.parametrize(
    ("channels", "width"), [(96, 256), (33, 100), (7, 5), (1, 1), (130, 175), (16, 4096)]
)
def test_eight_bits(channels: int, width: int, dtype: torch.dtype) -> None:
    check(*made(8, channels, width), dtype)


@DTYPES
@pytest.mark.parametrize(
    ("channels", "width", "group"),
    [(96, 256, 64), (32, 32, 32), (33, 96, 96), (130, 160, 32), (64, 512, 256), (1, 128, 128)],
)
def test_four_bits(channels: int, width: int, group: int, dtype: torch.dtype) -> None:
    check(*made(4, channels, width, group), dtype)


def test_four_bits_at_their_limits() -> None:
    """Sums of 16 bits are largest where every factor is: 255 times 15, of either sign."""
    q = torch.full((32, 256), 15, dtype=torch.uint8)
    q[1::2] = 0
    zeros = torch.zeros(32, 8, dtype=torch.int8)
    zeros[1::2] = 15
    parts = (q, zeros, torch.full((32, 8), 8, dtype=torch.int8), torch.ones(32))
    kernel, weight = Int4Pairs(*parts), reference.int4_weight(*parts)
    for sign in (1, -1):
        x = torch.full((5, 256), sign, dtype=torch.bfloat16)
        assert torch.equal(kernel(x), reference.linear(x, weight, None).bfloat16())


def test_every_zero_and_multiplier() -> None:
    q = torch.randint(0, 16, (64, 256), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (64, 4), dtype=torch.int8)
    multipliers = torch.randint(-128, 128, (64, 4), dtype=torch.int8)
    parts = (q, zeros, multipliers, torch.rand(64))
    check(Int4Pairs(*parts), reference.int4_weight(*parts), torch.bfloat16)


def test_the_largest_sums_of_eight_bits() -> None:
    width = 100_000
    kernel = Int8Pairs(torch.full((32, width), 127, dtype=torch.int8), torch.ones(32))
    y = kernel(torch.cat([torch.ones(1, width), -torch.ones(1, width)]).bfloat16())
    assert torch.allclose(y[0].float(), torch.tensor(127.0 * width), rtol=0.01)
    assert torch.equal(y[0], -y[1])


@DTYPES
def test_bit_for_bit_the_kernels_for_avx512(dtype: torch.dtype) -> None:
    """Sums are whole numbers, and what follows is the same: so the processor does not matter."""
    if not int8_tiles.available():
        pytest.skip("this processor lacks what they need")
    registry.load_vllm_ops()
    eight = weights.to_int8(torch.randn(80, 288))
    four = weights.to_int4(torch.randn(80, 288), 96)
    parts = (four.q, four.zeros, four.multipliers, four.steps)
    for rows in (1, 6, 50):
        x, bias = torch.randn(rows, 288).to(dtype), torch.randn(80)
        one, other = (make(eight.q, eight.scales) for make in (Int8Pairs, int8_tiles.Int8Tiles))
        assert torch.equal(one(x, bias), other(x, bias))
        if rows > 4:  # else it is vLLM's op, which rounds otherwise
            assert torch.equal(Int4Pairs(*parts)(x, bias), Int4Linear(*parts)(x, bias))


@BITS
def test_one_thread_and_more_threads_than_blocks(bits: int) -> None:
    kernel, _ = made(bits, 48, 128)
    x = torch.randn(50, 128).bfloat16()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(kernel(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@BITS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_of_zeros_and_what_is_not_finite(bits: int, bad: float) -> None:
    kernel, _ = made(bits, 64, 96)
    bias = torch.randn(64)
    x = torch.randn(6, 96).bfloat16()
    x[3] = 0
    good = kernel(x, bias)
    assert torch.equal(good[3], bias.bfloat16())
    x[2, 5] = bad
    assert torch.equal(kernel(x, bias)[[0, 1, 3, 4, 5]], good[[0, 1, 3, 4, 5]])


@BITS
def test_torch_compile_sees_one_op(bits: int) -> None:
    """The number of rows is not baked into what it compiles; rows need not be contiguous."""
    kernel, _ = made(bits, 64, 96)
    compiled = torch.compile(lambda x: kernel(x) * 2, fullgraph=True, backend="aot_eager")
    for rows in (3, 40):
        x = torch.randn(rows, 192).bfloat16()[:, ::2]
        assert torch.equal(compiled(x), kernel(x.contiguous()) * 2)


@BITS
def test_made_while_the_default_dtype_is_the_models(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 96).bfloat16()
    expected = made(bits, 64, 96)[0](x)
    torch.manual_seed(0)
    torch.randn(3, 96)
    weight = torch.randn(64, 96)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        if bits == 8:
            eight = weights.to_int8(weight)
            y = Int8Pairs(eight.q, eight.scales)(x)
        else:
            four = weights.to_int4(weight, 32)
            y = Int4Pairs(four.q, four.zeros, four.multipliers, four.steps)(x)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(y, expected)


def test_they_are_chosen_where_there_is_no_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    eight = weights.to_int8(torch.randn(8, 32))
    four = weights.to_int4(torch.randn(8, 96), 96)
    parts = (four.q, four.zeros, four.multipliers, four.steps)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setitem(registry._NEEDS, "int4", ("an_op_of_another_build",))
    assert isinstance(registry.int8(eight.q, eight.scales, torch.bfloat16), Int8Pairs)
    assert registry.missing("int4") == ""
    assert registry.fits("int4", 8, 96, 96)
    assert isinstance(registry.int4(*parts), Int4Pairs)


def test_processors_that_lack_what_they_need() -> None:
    """Then kernels are not to be had; nothing fails, and nothing is compiled."""
    before, native.LEFT_OUT = native.LEFT_OUT, ("avx2",)
    try:
        with pytest.raises(RuntimeError, match="the processor lacks avx2"):
            native.compiled("not LLVM code", ("avx2",))
    finally:
        native.LEFT_OUT = before
