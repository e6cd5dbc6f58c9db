"""GPU kernels against the oracle; `test_kernels_gpu.py` runs this in a process of its own.

On a machine with a GPU, directly: python -m pytest tests/gpu_kernels.py. Without one, in Triton's
interpreter.
"""

from __future__ import annotations

import pytest
import torch
from triton import knobs

from scalellm_plugins.kernels import reference, registry
from scalellm_plugins.kernels.gpu import int4_weight_only, rounding, split_k, w8a8
from scalellm_plugins.kernels.gpu.linear import GpuInt4, GpuInt8, GpuRoundedRows
from scalellm_plugins.kernels.gpu.rms_norm_round import rms_norm_round
from scalellm_plugins.kernels.gpu.swiglu_round import swiglu_round
from scalellm_plugins.quantization import weights

INTERPRETED = bool(knobs.runtime.interpret)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = (torch.bfloat16, torch.float16)
KINDS = (torch.int8, torch.float8_e4m3fn)
PRECISION = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
ROUNDED = {torch.int8: 0.51 / 127, torch.float8_e4m3fn: 1 / 16}
"""How much a number loses, at most, of its row's largest."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20261126)


def random(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, device=DEVICE)


def assert_close(y: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """To the largest value's precision: sums of products cancel."""
    assert y.shape == expected.shape
    assert (y.double() - expected).abs().max() <= tolerance * expected.abs().max()


def dequantized(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return q.double() * scales.double()[:, None]


def made_int4(channels: int, width: int, group: int) -> tuple[GpuInt4, torch.Tensor]:
    four = weights.to_int4(random(channels, width), group)
    parts = (four.q, four.zeros, four.multipliers, four.steps)
    return GpuInt4(*parts), reference.int4_weight(*parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "channels", "width", "group"),
    [
        (1, 70, 1024, 128),
        (3, 96, 256, 64),
        (16, 1, 128, 32),
        (20, 64, 512, 256),
        (70, 130, 256, 128),
    ],
)
def test_int4(rows: int, channels: int, width: int, group: int, dtype: torch.dtype) -> None:
    kernel, weight = made_int4(channels, width, group)
    x, bias = random(rows, width).to(dtype), random(channels)
    y = kernel(x, bias)
    assert y.dtype == dtype
    assert_close(y, reference.linear(x, weight, bias), PRECISION[dtype])
    assert_close(kernel(x), reference.linear(x, weight, None), PRECISION[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_zero_and_multiplier(dtype: torch.dtype) -> None:
    """A zero is taken off exactly, whatever the exponent's trick has added."""
    q = torch.randint(0, 16, (64, 256), dtype=torch.uint8, device=DEVICE)
    zeros = torch.randint(0, 16, (64, 2), dtype=torch.int8, device=DEVICE)
    multipliers = torch.randint(1, 18, (64, 2), dtype=torch.int8, device=DEVICE)
    parts = (q, zeros, multipliers, torch.rand(64, device=DEVICE) + 0.1)
    weight = reference.int4_weight(*parts)
    one_hot = torch.eye(256, device=DEVICE).to(dtype)[::7].contiguous()  # shows single weights
    assert_close(
        GpuInt4(*parts)(one_hot), reference.linear(one_hot, weight, None), PRECISION[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "channels", "width"), [(1, 70, 1000), (3, 96, 130), (16, 1, 64), (140, 130, 257)]
)
def test_int8(rows: int, channels: int, width: int, dtype: torch.dtype) -> None:
    eight = weights.to_int8(random(channels, width))
    weight = reference.int8_weight(eight.q, eight.scales)
    x, bias = random(rows, width).to(dtype), random(channels)
    kernel = GpuInt8(eight.q, eight.scales)
    assert_close(kernel(x, bias), reference.linear(x, weight, bias), PRECISION[dtype])
    assert_close(kernel(x), reference.linear(x, weight, None), PRECISION[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "channels", "width"), [(1, 70, 1000), (3, 96, 130), (32, 1, 128), (40, 130, 257)]
)
def test_w8a8(rows: int, channels: int, width: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    """Rounding inside the product (few rows) and before it (40)."""
    q, scales = rounding.round_rows(random(channels, width), kind)
    x, bias = random(rows, width).to(dtype), random(channels)
    exact = dequantized(*rounding.round_rows(x, kind))
    y = GpuRoundedRows(q, scales)(x, bias)
    expected = reference.linear(exact, dequantized(q, scales), bias)
    assert_close(y, expected, 2 * PRECISION[dtype])


def test_w8a8_takes_rows_that_are_rounded() -> None:
    q, scales = rounding.round_rows(random(70, 256), torch.int8)
    rows, steps = rounding.round_rows(random(5, 256), torch.int8)
    counters = split_k.counters(70, DEVICE)
    y = w8a8.w8a8(rows, steps, q, scales, counters, None, torch.bfloat16)
    expected = reference.linear(dequantized(rows, steps), dequantized(q, scales), None)
    assert_close(y, expected, PRECISION[torch.bfloat16])


def test_splitting_changes_nothing_and_leaves_the_counters() -> None:
    """The same bits every time, and a kernel that can be used again at once."""
    kernel, weight = made_int4(70, 2048, 128)
    x = random(2, 2048).bfloat16()
    shape = split_k.Shape(2, 70, 2048 // int4_weight_only.BLOCK, DEVICE)
    assert shape.split > 1
    first = kernel(x)
    for _ in range(3):
        assert torch.equal(kernel(x), first)
    assert not kernel._tensors[-1].any()
    assert_close(first, reference.linear(x, weight, None), PRECISION[torch.bfloat16])


@pytest.mark.parametrize("make", ["int8", "w8a8", "int4"])
def test_rows_do_not_meet(make: str) -> None:
    """Zeros, an infinity and a NaN stay in their rows; no rows are no error."""
    eight = weights.to_int8(random(32, 128))
    if make == "int4":
        kernel = made_int4(32, 128, 64)[0]
    else:
        kernel = (GpuInt8 if make == "int8" else GpuRoundedRows)(eight.q, eight.scales)
    x = random(5, 128).bfloat16()
    alone = kernel(x)
    x[1], x[2, 3], x[3, 4] = 0, float("inf"), float("nan")
    y = kernel(x)
    assert torch.equal(y[[0, 4]], alone[[0, 4]])
    assert not y[1].any()
    assert kernel(x[:0]).shape == (0, 32)


@pytest.mark.parametrize("make", ["int8", "w8a8", "int4"])
def test_compiled_and_meta_shapes_are_the_same(make: str) -> None:
    eight = weights.to_int8(random(48, 128))
    if make == "int4":
        kernel = made_int4(48, 128, 64)[0]
    else:
        kernel = (GpuInt8 if make == "int8" else GpuRoundedRows)(eight.q, eight.scales)
    op = getattr(torch.ops.scalellm, f"gpu_{make}")
    tensors = (random(3, 128).bfloat16(), *kernel._tensors, None)
    meta = [None if one is None else one.to("meta") for one in tensors]
    assert op(*meta).shape == op(*tensors).shape == (3, 48)
    assert op(*meta).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 100, 1024])
def test_rounding(width: int, kind: torch.dtype) -> None:
    x = random(4, width).bfloat16()
    x[1] = 0
    x[2] *= 1e-30
    q, scales = rounding.round_rows(x, kind)
    assert q.dtype == kind
    assert not q.double()[1].any()
    for row in range(4):
        assert_close(
            dequantized(q, scales)[row : row + 1], x[row : row + 1].double(), ROUNDED[kind]
        )
        if row != 1:
            assert q.double()[row].abs().max() == rounding.LARGEST[kind]


def test_halves_are_rounded_to_even() -> None:
    """As torch does it; what is rounded up in the middle would be off by a step in the mean."""
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]], device=DEVICE)
    q, _ = rounding.round_rows(x, torch.int8)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [False, True])
def test_rms_norm(added: bool, dtype: torch.dtype, kind: torch.dtype) -> None:
    x, weight = random(3, 100).to(dtype), random(100).to(dtype)
    residual = random(3, 100).to(dtype) if added else None
    before = None if residual is None else residual.clone()
    q, scales = rms_norm_round(x, weight, 1e-5, kind, residual)
    expected = reference.rms_norm(x, weight, 1e-5, before)
    for row in range(3):
        assert_close(dequantized(q, scales)[row : row + 1], expected[row : row + 1], ROUNDED[kind])
    if residual is not None:
        assert_close(residual, x.double() + before.double(), PRECISION[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 100])
def test_swiglu(width: int, kind: torch.dtype) -> None:
    x = random(3, 2 * width).bfloat16()
    q, scales = swiglu_round(x, kind)
    for row in range(3):
        assert_close(
            dequantized(q, scales)[row : row + 1],
            reference.swiglu(x)[row : row + 1],
            ROUNDED[kind],
        )


def test_the_registry_gives_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_on_gpu", lambda tensor: True)
    eight = weights.to_int8(random(32, 128))
    assert isinstance(registry.int8(eight.q, eight.scales, torch.bfloat16), GpuInt8)
    rounding_rows = registry.int8(eight.q, eight.scales, torch.bfloat16, round_rows=True)
    assert isinstance(rounding_rows, GpuRoundedRows)
    four = weights.to_int4(random(32, 128), 64)
    parts = (four.q, four.zeros, four.multipliers, four.steps)
    assert isinstance(registry.int4(*parts), GpuInt4)
    for width, group in ((1152, 128), (896, 64), (1024, 256)):
        assert registry.fits("int4", 32, width, group, "cuda")
    for width, group in ((160, 32), (384, 96), (128, 0)):
        assert not registry.fits("int4", 32, width, group, "cuda")
