"""What a linear layer costs on a GPU: 8-bit and 4-bit weights beside cuBLAS's bf16.

    python -m scalellm_plugins.benchmarks.gpu_kernel_cost [--rows 1,16,256] [--shape 4096x4096]

Needs a CUDA device, torch and Triton, not vLLM. Microseconds, medians; the kernels take turns, each
in a CUDA graph that goes through as many copies of its weight as make 400 MB in bf16, so that
weights come from memory as they do in a model. GB/s counts the weight alone; "copy" is what a copy
of as many bytes reaches, read and written.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scalellm_plugins.kernels import registry
from scalellm_plugins.quantization import weights

BYTES = 400e6
ROUNDS = 20


def main() -> None:
    """Measure, print a table, write JSON if asked for."""
    parser = argparse.ArgumentParser(
        prog="gpu_kernel_cost", description="What a linear layer costs on a GPU."
    )
    parser.add_argument("--rows", default="1,4,8,16,32,64,128,256,1024")
    parser.add_argument("--shape", default="4096x4096", help="output x input features")
    parser.add_argument("--group", type=int, default=128, help="of 4-bit weights")
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here; without one: kernel_cost, for CPUs")
    channels, width = map(int, options.shape.split("x"))
    kernels, sizes = made(channels, width, options.group)
    found: dict[str, Any] = {
        "command": f"gpu_kernel_cost --rows {options.rows} --shape {options.shape}",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_gb_per_s": round(copy_speed()),
        "us": {},
    }
    print(f"{found['device']}, copy {found['copy_gb_per_s']} GB/s")
    for rows in map(int, options.rows.split(",")):
        x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
        us = measured({name: rotation(copies, x) for name, copies in kernels.items()})
        found["us"][rows] = us
        cells = [
            f"{name} {time:8.1f} ({us['bf16'] / time:4.2f} x, {sizes[name] / time / 1e3:5.0f} GB/s)"
            for name, time in us.items()
        ]
        print(f"{rows:6} " + "  ".join(cells), flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


def made(channels: int, width: int, group: int) -> tuple[dict[str, list[Any]], dict[str, float]]:
    """Return kernels by name, copies in rotation, and the bytes of one weight."""
    copies = max(2, round(BYTES / (2 * channels * width)))
    weight = torch.randn(channels, width, device="cuda", dtype=torch.bfloat16)
    eight = weights.to_int8(weight)
    four = weights.to_int4(weight, group)
    parts = (four.q, four.zeros, four.multipliers, four.steps)

    def plain() -> Callable[[torch.Tensor], torch.Tensor]:
        own = weight.clone()
        return lambda x: torch.nn.functional.linear(x, own)

    def eight_bits(round_rows: bool) -> registry.Kernel:
        return registry.int8(eight.q.clone(), eight.scales, weight.dtype, round_rows)

    kernels: dict[str, list[Any]] = {
        "bf16": [plain() for _ in range(copies)],
        "int8": [eight_bits(False) for _ in range(copies)],
        "w8a8": [eight_bits(True) for _ in range(copies)],
        "int4": [registry.int4(*parts) for _ in range(copies)],
    }
    size = channels * width
    return kernels, {"bf16": 2.0 * size, "int8": size, "w8a8": size, "int4": size / 2}


def rotation(copies: list[Any], x: torch.Tensor) -> tuple[Callable[[], Any], int]:
    """Return a call that multiplies x by each copy of a weight, and their number."""
    return lambda: [kernel(x) for kernel in copies], len(copies)


def measured(calls: dict[str, tuple[Callable[[], Any], int]]) -> dict[str, float]:
    """Return µs per product, medians; each call makes a number of them and is captured first."""
    graphs = {}
    for name, (call, _) in calls.items():
        call()  # compiled
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, (_, number) in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / number)
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


def copy_speed() -> float:
    """Return GB/s of a copy, bytes read and written."""
    source = torch.empty(int(BYTES), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    us = measured({"copy": (lambda: target.copy_(source), 1)})["copy"]
    return 2 * BYTES / us / 1e3


if __name__ == "__main__":
    main()
