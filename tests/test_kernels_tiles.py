"""Our own products on CPUs against the oracle, compiled for this processor and for older ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from scalellm_plugins.kernels import (
    int4_code,
    int4_tiles,
    int8_code,
    int8_tiles,
    native,
    reference,
    registry,
    team,
)
from scalellm_plugins.kernels.int4_tiles import Int4Tiles
from scalellm_plugins.kernels.int8_tiles import Int8Tiles
from scalellm_plugins.quantization import weights

from .kernel_parts import error

Kind = Literal["int8", "int4", "int4 with scales"]
KINDS = pytest.mark.parametrize("kind", ["int8", "int4", "int4 with scales"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
ROWS = (*range(1, 13), 27, 49, 70)
"""Every size of a tile, alone and one after another, and more than one block's turn."""


@dataclass(frozen=True)
class Ways:
    """How the kernels are cut."""

    int8: team.Tiling
    int4: team.Tiling


WIDE = Ways(int8_code.WIDE, int4_code.WIDE)
NARROW = Ways(int8_code.NARROW, int4_code.NARROW)


def forget() -> None:
    """Compile anew."""
    for module in (int4_tiles, int8_tiles):
        module._compiled.cache_clear()
        module.best.cache_clear()


@pytest.fixture(
    scope="module",
    params=[
        (WIDE, ()),
        (WIDE, ("avx512bf16", "avx512fp16", "avx512vbmi", "avxvnni")),
        (NARROW, ("avx512", "avxvnni", "gfni")),
    ],
    ids=["this processor", "Cascade Lake", "AVX2"],
)
def ways(request: pytest.FixtureRequest) -> Iterator[Ways]:
    """Tilings, compiled without the features of processors that came after those named."""
    cut, without = request.param
    before, native.LEFT_OUT = native.LEFT_OUT, without
    forget()
    best = int8_tiles.best()
    if best is not None and (cut is NARROW or best is int8_code.WIDE):
        yield cut
    native.LEFT_OUT = before
    forget()
    if best is None or (cut is WIDE and best is not int8_code.WIDE):
        pytest.skip("this processor lacks what they need")


def made(
    ways: Ways, kind: Kind, channels: int, width: int, group: int = 32, symmetric: bool = False
) -> tuple[registry.Kernel, torch.Tensor]:
    """A kernel for bfloat16, and the weight that it stands for."""
    weight = torch.randn(channels, width, dtype=torch.float32)
    if kind == "int8":
        eight = weights.to_int8(weight)
        kernel = Int8Tiles(eight.q, eight.scales, ways.int8)
        return kernel, reference.int8_weight(eight.q, eight.scales)
    four = weights.to_int4(weight, group, symmetric=symmetric)
    if kind == "int4":
        parts = (four.q, four.zeros, four.multipliers, four.steps)
        return Int4Tiles(*parts, ways.int4), reference.int4_weight(*parts)
    return scaled(ways, four, torch.bfloat16)


def scaled(
    ways: Ways, four: weights.Int4Weight, dtype: torch.dtype
) -> tuple[registry.Kernel, torch.Tensor]:
    """The same with scales that are no multiples of anything."""
    scales = (torch.rand(four.zeros.shape) + 0.1).to(dtype)
    kernel = Int4Tiles(four.q, four.zeros, scales, None, ways.int4)
    whole = reference.int4_weight(
        four.q, four.zeros, torch.ones_like(four.zeros), torch.ones(len(four.q))
    )
    return kernel, whole * scales.double().repeat_interleave(four.q.shape[1] // scales.shape[1], 1)


def check(kernel: registry.Kernel, weight: torch.Tensor, dtype: torch.dtype) -> None:
    channels, width = weight.shape
    bias = torch.randn(channels)
    for rows in ROWS:
        x = torch.randn(rows, width).to(dtype)
        offset = bias if rows % 2 else None
        y = kernel(x, offset)
        assert y.shape == (rows, channels)
        assert y.dtype == dtype
        assert error(y, x, weight, offset) < 0.01


@DTYPES
@pytest.mark.parametrize(
    ("channels", "width"), [(96, 256), (33, 100), (7, 5), (1, 1), (130, 175), (16, 2048)]
)
def test_eight_bits(ways: Ways, channels: int, width: int, dtype: torch.dtype) -> None:
    check(*made(ways, "int8", channels, width), dtype)


@DTYPES
@pytest.mark.parametrize(
    ("channels", "width", "group", "symmetric"),
    [
        (96, 256, 64, False),
        (32, 32, 32, True),
        (33, 96, 96, False),
        (130, 160, 32, True),
        (48, 512, 256, False),
        (1, 128, 128, False),
    ],
)
def test_four_bits(
    ways: Ways, channels: int, width: int, group: int, symmetric: bool, dtype: torch.dtype
) -> None:
    check(*made(ways, "int4", channels, width, group, symmetric), dtype)
    four = weights.to_int4(torch.randn(channels, width), group, symmetric=symmetric)
    check(*scaled(ways, four, dtype), dtype)


@KINDS
def test_a_row_is_the_same_whatever_is_beside_it(ways: Ways, kind: Kind) -> None:
    kernel, _ = made(ways, kind, 80, 288, 96)
    x = torch.randn(50, 288).bfloat16()
    together = kernel(x)
    for rows in (1, 2, 3, 5, 8, 12, 17):
        assert torch.equal(kernel(x[:rows].contiguous()), together[:rows])


def test_the_largest_sums_of_eight_bits(ways: Ways) -> None:
    """32 bits hold them: they wrap around and back, where K is large and every factor is 127."""
    width = 100_000
    q = torch.full((32, width), 127, dtype=torch.int8)
    y = Int8Tiles(q, torch.ones(32), ways.int8)(
        torch.cat([torch.ones(1, width), -torch.ones(1, width)]).bfloat16()
    )
    assert torch.allclose(y[0].float(), torch.tensor(127.0 * width), rtol=0.01)
    assert torch.equal(y[0], -y[1])


@pytest.mark.parametrize("multiples", [True, False])
def test_the_largest_sums_of_four_bits(ways: Ways, multiples: bool) -> None:
    """Sums of 16 bits are largest where every factor is: 255 times 15, of either sign."""
    q = torch.full((64, 256), 15, dtype=torch.uint8)
    zeros = torch.zeros(64, 8, dtype=torch.int8)
    q[1::2], zeros[1::2] = 0, 15
    ones = torch.ones(64, 8)
    scales = ones.to(torch.int8) if multiples else ones.bfloat16()
    kernel = Int4Tiles(q, zeros, scales, torch.ones(64) if multiples else None, ways.int4)
    weight = q.double() - zeros.double().repeat_interleave(32, 1)
    for sign in (1, -1):
        x = torch.full((9, 256), sign, dtype=torch.bfloat16)
        assert torch.equal(kernel(x), reference.linear(x, weight, None).bfloat16())


def test_every_zero_and_multiplier(ways: Ways) -> None:
    """Also those whose products are no 8 bits."""
    q = torch.randint(0, 16, (64, 256), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (64, 4), dtype=torch.int8)
    multipliers = torch.randint(-128, 128, (64, 4), dtype=torch.int8)
    parts = (q, zeros, multipliers, torch.rand(64))
    check(Int4Tiles(*parts, ways.int4), reference.int4_weight(*parts), torch.bfloat16)


@KINDS
def test_one_thread_and_more_threads_than_blocks(ways: Ways, kind: Kind) -> None:
    """With so much to do, every thread that there is has a part of it."""
    kernel, _ = made(ways, kind, 96, 2048)
    before = torch.get_num_threads()
    try:
        for rows in (1, 2, 50):
            x = torch.randn(rows, 2048).bfloat16()
            results = []
            for threads in (1, 2, 8):
                torch.set_num_threads(threads)
                results.append(kernel(x))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@KINDS
@pytest.mark.parametrize("rows", [2, 6, 40])
def test_rows_of_zeros_and_what_is_not_finite(ways: Ways, kind: Kind, rows: int) -> None:
    kernel, _ = made(ways, kind, 64, 96)
    bias = torch.randn(64)
    bias[:2] = 1 + torch.tensor([1, 3]) / 256  # halfway between two: to the even one
    x = torch.randn(rows, 96).bfloat16()
    x[rows - 1] = 0
    good = kernel(x, bias)
    assert torch.equal(good[rows - 1], bias.bfloat16())
    assert torch.equal(kernel(torch.zeros(1, 96).bfloat16())[0], torch.zeros(64).bfloat16())
    for bad in (float("nan"), float("inf")):
        x[rows - 1, 5] = bad
        assert torch.equal(kernel(x, bias)[: rows - 1], good[: rows - 1])


@KINDS
def test_torch_compile_sees_one_op(ways: Ways, kind: Kind) -> None:
    """The number of rows is not baked into what it compiles; rows need not be contiguous."""
    kernel, _ = made(ways, kind, 64, 96)
    compiled = torch.compile(lambda x: kernel(x) * 2, fullgraph=True, backend="aot_eager")
    for rows in (3, 9, 40):
        x = torch.randn(rows, 192).bfloat16()[:, ::2]
        assert torch.equal(compiled(x), kernel(x.contiguous()) * 2)


@KINDS
def test_made_while_the_default_dtype_is_the_models(ways: Ways, kind: Kind) -> None:
    """As vLLM does it while it loads: 32-bit numbers must be asked for as such."""
    results = []
    before = torch.get_default_dtype()
    x = torch.randn(3, 96).bfloat16()
    try:
        for default in (torch.float32, torch.bfloat16):
            torch.set_default_dtype(default)
            torch.manual_seed(0)
            results.append(made(ways, kind, 64, 96)[0](x))
    finally:
        torch.set_default_dtype(before)
    assert (results[1] - results[0]).abs().max() < 0.01 * results[0].abs().max()


@DTYPES
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_bit_for_bit_the_same_on_every_processor(
    kind: Kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are whole numbers, and what follows is the same."""
    monkeypatch.setattr(native, "LEFT_OUT", ())
    forget()
    if int8_tiles.best() is not int8_code.WIDE:
        pytest.skip("this processor has one way only")
    kernels = []
    for cut in (WIDE, NARROW):
        torch.manual_seed(1)
        kernels.append(made(cut, kind, 80, 288, 96)[0])
    for rows in (1, 6, 50):
        x, bias = torch.randn(rows, 288).to(dtype), torch.randn(80)
        assert torch.equal(kernels[0](x, bias), kernels[1](x, bias))


def test_nothing_beyond_rows_and_bias_is_read() -> None:
    """In a process of its own: reading there ends it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.guarded_rows"],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_processors_that_lack_what_kernels_need() -> None:
    """Nothing is compiled for them, and nothing fails."""
    before, native.LEFT_OUT = native.LEFT_OUT, ("avx512", "f16c")
    forget()
    try:
        with pytest.raises(RuntimeError, match="the processor lacks f16c"):
            native.compiled("not LLVM code", ("avx2", "f16c"))
        assert int8_tiles.best() is None
        assert "AVX2 and F16C" in registry.missing("int4")
    finally:
        native.LEFT_OUT = before
        forget()


def test_what_the_registry_gives_out(monkeypatch: pytest.MonkeyPatch) -> None:
    eight = weights.to_int8(torch.randn(2048, 512))
    monkeypatch.setattr(registry, "fits_packed", lambda q, dtype: False)
    monkeypatch.setattr(registry, "Int8Linear", lambda *arguments: "oneDNN")
    for build, tiling, onednn in (
        ("AVX512", int8_code.WIDE, False),
        ("AVX2", int8_code.NARROW, False),
        ("AVX512", int8_code.NARROW, True),  # Skylake
        ("AVX512", None, True),
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda build=build: build)
        monkeypatch.setattr(int8_tiles, "best", lambda tiling=tiling: tiling)
        kernel = registry.int8(eight.q, eight.scales, torch.bfloat16)
        assert (kernel == "oneDNN") == onednn
    four = weights.to_int4(torch.randn(8, 96), 96)
    assert registry.fits("int4", 8, 96, 96)
    kernel = registry.int4(four.q, four.zeros, four.multipliers, four.steps)
    assert isinstance(kernel, Int4Tiles)
