"""torch's weight-only products, and when they are chosen."""

from __future__ import annotations

import pytest
import torch

from scalellm_plugins.kernels import reference, registry, weight_only
from scalellm_plugins.kernels.weight_only import Int4WeightOnly, Int8WeightOnly
from scalellm_plugins.quantization import weights

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def check(kernel: registry.Kernel, weight: torch.Tensor, dtype: torch.dtype) -> None:
    channels, width = weight.shape
    bias = torch.randn(channels)
    for rows in (1, 3, 17, 70):
        x = torch.randn(rows, width).to(dtype)
        for offset in (bias, None):
            y, expected = kernel(x, offset), reference.linear(x, weight, offset)
            assert y.shape == (rows, channels)
            assert (y - expected).abs().max() < 0.02 * expected.abs().max()


@DTYPES
@pytest.mark.parametrize(("channels", "width"), [(96, 256), (33, 96), (7, 64)])
def test_eight_bits(channels: int, width: int, dtype: torch.dtype) -> None:
    eight = weights.to_int8(torch.randn(channels, width))
    weight = reference.int8_weight(eight.q, eight.scales)
    check(Int8WeightOnly(eight.q, eight.scales, dtype), weight, dtype)


@DTYPES
@pytest.mark.parametrize(
    ("channels", "width", "group"), [(96, 256, 64), (33, 96, 32), (130, 512, 256)]
)
def test_four_bits(channels: int, width: int, group: int, dtype: torch.dtype) -> None:
    four = weights.to_int4(torch.randn(channels, width), group)
    parts = (four.q, four.zeros, four.multipliers, four.steps)
    check(Int4WeightOnly(*parts, dtype), reference.int4_weight(*parts), dtype)


def test_without_avx512_they_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert weight_only.preferred()
    assert registry.missing("int4") == ""
    assert registry.fits("int4", 64, 96, 32)
    assert not registry.fits("int4", 64, 96, 96), "the op knows groups of powers of two only"
    eight = weights.to_int8(torch.randn(8, 32))
    assert isinstance(registry.int8(eight.q, eight.scales, torch.bfloat16), Int8WeightOnly)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not weight_only.preferred()
