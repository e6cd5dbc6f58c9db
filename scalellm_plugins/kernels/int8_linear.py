"""y = x · Wᵀ with 8-bit weights and rows of x rounded to 8 bits as they come (W8A8, dynamic).

One scale per output channel and one per row of x, both symmetric. The product is oneDNN's, through
the ops of vLLM: int8 dot products at every number of rows, on every x86 processor. (Weight-only
kernels with 16-bit rows were measured, too: torch's `_weight_int8pack_mm` is slower than bf16.)

Rows that hold an infinity or NaN have no defined result; other rows are not affected by them.
"""

from __future__ import annotations

import torch

_CACHED_SHAPES = 32
"""oneDNN primitives that are kept per layer, one per number of rows; the least recent goes."""


class Int8Linear:
    """A packed weight. oneDNN holds it; this object frees it.

    Args:
        q: int8 [N, K], within ±127.
        scales: float32 [N].
        dtype: of x and y, bfloat16 or float16.
    """

    def __init__(self, q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        self.out_features = q.shape[0]
        self._scales = scales.reshape(-1, 1).contiguous()  # oneDNN copies q, but points to these
        self.handle = torch.tensor(
            torch.ops._C.create_onednn_scaled_mm_handler(
                q.contiguous().t(), self._scales, dtype, True, False, _CACHED_SHAPES
            ),
            dtype=torch.int64,
        )
        # Kept here: at the interpreter's end `torch` may be gone before this object.
        self._release = torch.ops._C.release_dnnl_matmul_handler

    def __del__(self) -> None:
        if hasattr(self, "_release"):  # else oneDNN refused the weight
            self._release(self.handle.item())

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y [M, N] for x [M, K] of the dtype that was given, and bias float32 [N]."""
        if torch.compiler.is_compiling():
            compiled: torch.Tensor = torch.ops.scalellm.int8_linear(
                x, self.handle, self.out_features, bias
            )
            return compiled
        return int8_linear(x, self.handle, self.out_features, bias)


def int8_linear(
    x: torch.Tensor, handle: torch.Tensor, out_features: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply by the weight that `Int8Linear.handle` stands for."""
    ops = torch.ops._C
    x = x.contiguous()
    rounded = torch.empty_like(x, dtype=torch.int8)
    scales = torch.empty((x.shape[0], 1), dtype=torch.float32)
    ops.dynamic_scaled_int8_quant(rounded, x, scales, None)
    y = torch.empty((x.shape[0], out_features), dtype=x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    ops.onednn_scaled_mm(y, rounded, scales, None, None, bias, handle)
    return y


# torch.compile sees one opaque op. (`torch.library.custom_op` would cost each call 10 µs more.)
_library = torch.library.Library("scalellm", "FRAGMENT")
_library.define("int8_linear(Tensor x, Tensor handle, int out_features, Tensor? bias) -> Tensor")
_library.impl("int8_linear", int8_linear, "CPU")

torch.library.register_fake(
    "scalellm::int8_linear",
    lambda x, _, out_features, __: x.new_empty((x.shape[0], out_features)),
    lib=_library,
)
