"""4-bit linear layers against the oracle, on all three ways that the number of rows chooses."""

from __future__ import annotations

import pytest
import torch

from scalellm_plugins.kernels import fused, reference, registry
from scalellm_plugins.kernels.int4_linear import Int4Linear
from scalellm_plugins.quantization import weights

pytestmark = pytest.mark.vllm

ROWS = (1, 2, 3, 4, 5, 7, 16, 17, 40, 130)


@pytest.fixture(autouse=True, scope="module")
def ops() -> None:
    registry.load_vllm_ops()
    if why := registry.missing("int4"):
        pytest.skip(why)


def made(
    channels: int, width: int, group: int, symmetric: bool = False
) -> tuple[Int4Linear, torch.Tensor]:
    """A kernel, and the weight that it stands for."""
    four = weights.to_int4(torch.randn(channels, width), group, symmetric=symmetric)
    parts = (four.q, four.zeros, four.multipliers, four.steps)
    return Int4Linear(*parts), reference.int4_weight(*parts)


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, as a share of the largest value."""
    return float((y.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("channels", "width", "group"),
    [(96, 256, 64), (32, 32, 32), (33, 96, 96), (130, 160, 32), (64, 512, 256), (1, 128, 128)],
)
def test_it_is_the_product(
    channels: int, width: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    kernel, weight = made(channels, width, group, symmetric)
    bias = torch.randn(channels)
    for rows in ROWS:
        x = torch.randn(rows, width).to(dtype)
        exact = reference.quantized_rows(x)
        y = kernel(x, bias)
        assert y.shape == (rows, channels)
        assert y.dtype == dtype
        assert error(y, reference.linear(exact, weight, bias)) < 0.01
        assert error(kernel(x), reference.linear(exact, weight, None)) < 0.01


def test_every_zero_and_multiplier() -> None:
    """Also those whose products fit 8 bits only after they have wrapped around: 15 times 8."""
    assert fused.available(), "vLLM has numba, and numba has llvmlite"
    q = torch.randint(0, 16, (64, 256), dtype=torch.uint8)
    zeros = torch.randint(7, 16, (64, 4), dtype=torch.int8)
    multipliers = torch.randint(1, 9, (64, 4), dtype=torch.int8)
    parts = (q, zeros, multipliers, torch.rand(64))
    kernel, weight = Int4Linear(*parts), reference.int4_weight(*parts)
    for rows in (3, 50):
        x = torch.randn(rows, 256).bfloat16()
        exact = reference.quantized_rows(x)
        assert error(kernel(x), reference.linear(exact, weight, None)) < 0.01


def test_one_thread_and_more_threads_than_blocks() -> None:
    kernel, _ = made(64, 128, 64)
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


def test_without_the_kernel_for_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where llvmlite is not installed: slower, the same product."""
    kernel, weight = made(64, 128, 64)
    x = torch.randn(50, 128).bfloat16()
    monkeypatch.setattr(fused, "available", lambda: False)
    assert error(kernel(x), reference.linear(reference.quantized_rows(x), weight, None)) < 0.01


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_rows_of_zeros_and_what_is_not_finite(rows: int) -> None:
    kernel, _ = made(64, 96, 32)
    bias = torch.randn(64)
    x = torch.randn(rows, 96).bfloat16()
    x[rows - 1] = 0
    good = kernel(x, bias)
    assert torch.equal(good[rows - 1], bias.bfloat16())
    for bad in (float("nan"), float("inf")):
        x[rows - 1, 5] = bad
        assert torch.equal(kernel(x, bias)[: rows - 1], good[: rows - 1])


def test_torch_compile_sees_one_op() -> None:
    """The number of rows is not baked into what it compiles: each still takes its own way."""
    kernel, _ = made(64, 96, 32)
    compiled = torch.compile(lambda x: kernel(x) * 2, fullgraph=True, backend="aot_eager")
    for rows in (3, 9, 40):
        x = torch.randn(rows, 96).bfloat16()
        assert torch.equal(compiled(x), kernel(x) * 2)
