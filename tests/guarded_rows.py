"""Products whose rows and bias end where a page ends that nobody may read from; exit code 0 or -11.

`test_kernels_tiles.py` runs this in a process of its own.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

from scalellm_plugins.kernels import int4_code, int4_tiles, int8_code, int8_tiles
from scalellm_plugins.kernels.int4_tiles import Int4Tiles
from scalellm_plugins.kernels.int8_tiles import Int8Tiles
from scalellm_plugins.quantization import weights

PAGE = mmap.PAGESIZE
CHANNELS = 35

_kept: list[mmap.mmap] = []


def at_the_end(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers, right before a page without any rights."""
    size = -(-tensor.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, size + PAGE)
    _kept.append(memory)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    found = whole[size - tensor.nbytes : size].view(tensor.dtype).view(tensor.shape)
    found.copy_(tensor)
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(whole.data_ptr() + size)
    assert libc.mprotect(guard, ctypes.c_size_t(PAGE), 0) == 0
    return found


def main() -> None:
    """Every way that this processor has."""
    bias = at_the_end(torch.randn(CHANNELS))
    wide = int8_tiles.best() is int8_code.WIDE
    for width in (97, 96):
        eight = weights.to_int8(torch.randn(CHANNELS, width))
        four = weights.to_int4(torch.randn(CHANNELS, 96), 32)
        parts = (four.q, four.zeros, four.multipliers, four.steps)
        tilings = [(int8_code.NARROW, int4_code.NARROW)]
        if wide:
            tilings.append((int8_code.WIDE, int4_code.WIDE))
        for of8, of4 in tilings:
            for rows in (1, 3, 20):
                x = at_the_end(torch.randn(rows, width).bfloat16())
                Int8Tiles(eight.q, eight.scales, of8)(x, bias)
                if width == 96:
                    Int4Tiles(*parts, of4)(x, bias)


if __name__ == "__main__":
    if int4_tiles.best() is not None:
        main()
