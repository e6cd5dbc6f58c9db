"""Which kernels this process has: by device, by instruction set, by what is registered.

GPUs have Triton's, for 16-bit rows and for rows rounded to 8 bits. CPUs round rows wherever that is
faster, so there both are the same.

vLLM has three builds of its CPU ops, and loads the one for the processor: AVX512 with bf16 dot
products (or AMX), AVX512, AVX2. Our own kernels have two ways: for AVX512 with products of bytes
(VNNI: Cascade Lake, Zen 4 and later), and for AVX2.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from typing import Literal, Protocol

import torch

from . import int4_packed, int4_tiles, int8_code, int8_tiles
from .int4_packed import Int4Packed
from .int4_tiles import Int4Tiles
from .int8_linear import Int8Linear
from .int8_packed import Int8Packed
from .int8_packed import fits as fits_packed
from .int8_tiles import Int8Tiles

Kind = Literal["int8", "int4"]

_ONEDNN = (
    "create_onednn_scaled_mm_handler",
    "release_dnnl_matmul_handler",
    "dynamic_scaled_int8_quant",
    "onednn_scaled_mm",
)
"""vLLM's ops that 8 bits can do with."""

_CALLS_BIND = 1 << 19
"""Weights of a layer so small that what a call costs binds: vLLM's op has 2 µs less of that."""


def load_vllm_ops() -> None:
    """Register vLLM's ops for this processor, where vLLM is installed and has not done so."""
    with contextlib.suppress(ImportError):
        importlib.import_module("vllm._custom_ops")


def missing(kind: Kind, device: str = "cpu") -> str:
    """Return why weights of this kind cannot be multiplied on a device; "" where they can."""
    if device == "cuda" and torch.version.hip is None:
        return "" if importlib.util.find_spec("triton") else "Triton is not installed"
    if device != "cpu":
        return f"there are no {kind} kernels for the device {device!r}, only for CPUs and NVIDIA's"
    if (int4_tiles if kind == "int4" else int8_tiles).best():
        return ""
    why = "our kernels need a processor with AVX2 and F16C, and llvmlite"
    if kind == "int4":
        return why
    absent = [name for name in _ONEDNN if not hasattr(torch.ops._C, name)]
    build = torch.backends.cpu.get_cpu_capability()
    return f"{why}; vLLM's ops ({build}) lack {', '.join(absent)}" if absent else ""


def fits(
    kind: Kind, out_features: int, in_features: int, group: int = 0, device: str = "cpu"
) -> bool:
    """Whether a weight [out_features, in_features] has a shape that the kernels take."""
    if kind == "int8":
        return out_features > 0 and in_features > 0
    if device == "cuda":  # whole blocks of K, and whole groups in them or they in groups
        return group > 0 and in_features % 128 == 0 and (128 % group == 0 or group % 128 == 0)
    return group > 0 and group % 32 == 0 and in_features % group == 0


def _on_gpu(tensor: torch.Tensor) -> bool:
    return bool(tensor.is_cuda)


class Kernel(Protocol):
    """A packed weight [N, K], ready to be multiplied."""

    out_features: int

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y [M, N] for x [M, K] of the model's dtype, and bias float32 [N]."""


def int8(
    q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, round_rows: bool = False
) -> Kernel:
    """Pack 8-bit weights [N, K] for the kernel that is fastest with them here.

    `round_rows`: multiply rows that are rounded to 8 bits, too, where one may choose.
    """
    if _on_gpu(q):
        from .gpu import linear

        return (linear.GpuRoundedRows if round_rows else linear.GpuInt8)(q, scales)
    tiling = int8_tiles.best()
    skylake = tiling is int8_code.NARROW and "AVX512" in torch.backends.cpu.get_cpu_capability()
    if skylake or torch.cpu._is_amx_tile_supported():
        tiling = None  # oneDNN uses vectors of 512 bits, and the matrix units of AMX
    small = q.numel() < _CALLS_BIND and fits_packed(q, dtype)
    if tiling and not small:
        return Int8Tiles(q, scales, tiling)
    return Int8Packed(q, scales) if fits_packed(q, dtype) else Int8Linear(q, scales, dtype)


def int4(
    q: torch.Tensor,
    zeros: torch.Tensor,
    multipliers: torch.Tensor,
    steps: torch.Tensor,
) -> Kernel:
    """Pack 4-bit weights [N, K] in groups, as `quantization/weights.py` makes them."""
    if _on_gpu(q):
        from .gpu import linear

        return linear.GpuInt4(q, zeros, multipliers, steps)
    if int4_packed.preferred():
        return Int4Packed(q, zeros, multipliers * steps[:, None])
    return Int4Tiles(q, zeros, multipliers, steps)


def int4_scaled(q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> Kernel:
    """Pack 4-bit weights [N, K] in groups with scales of the rows' type, on a CPU."""
    return Int4Tiles(q, zeros, scales, None)
