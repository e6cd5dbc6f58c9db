"""What a linear layer costs by kernel and number of rows: 8-bit and 4-bit weights beside bf16.

    python -m scalellm_plugins.benchmarks.kernel_cost [--rows 1,4,16] [--shape 4096x4096] [--all]

Microseconds, medians; the kernels take turns, call by call. Each has as many copies of its weight
as make 200 MB in bf16, in rotation, so that weights come from memory as they do in a model. "bf16"
is vLLM's own layer without quantization (oneDNN). `--all` adds the single ops that were candidates.
`--build avx2` loads vLLM's ops for processors without AVX512, and holds torch, oneDNN and our
kernels to AVX2. GB/s are those of the weight's bytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scalellm_plugins.kernels import native, registry
from scalellm_plugins.kernels.int8_linear import Int8Linear
from scalellm_plugins.quantization import weights

BYTES = 200e6
Multiply = Callable[[torch.Tensor, int], Any]


def main() -> None:
    """Measure, print a table, write JSON if asked for."""
    parser = argparse.ArgumentParser(
        prog="kernel_cost", description="What a linear layer costs by kernel and number of rows."
    )
    parser.add_argument("--rows", default="1,4,8,16,32,64,128,256")
    parser.add_argument("--shape", default="4096x4096", help="output x input features")
    parser.add_argument("--group", type=int, default=128, help="of 4-bit weights")
    parser.add_argument("--calls", type=int, default=15, help="of each kernel, per number of rows")
    parser.add_argument("--all", action="store_true", help="candidates, too")
    parser.add_argument("--build", choices=("native", "avx2"), default="native")
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    options = parser.parse_args()
    load(options.build)
    channels, width = map(int, options.shape.split("x"))
    copies = max(2, round(BYTES / (2 * channels * width)))
    made = kernels(channels, width, options.group, copies, options.all)
    results: dict[int, dict[str, float]] = {}
    print(f"| rows | {' | '.join(made)} |\n|---|{'---|' * len(made)}")
    for rows in map(int, options.rows.split(",")):
        found = measure(made, rows, width, copies, options.calls)
        results[rows] = found
        cells = [
            f"{us:.0f} ({found['bf16'] / us:.2f} x, "
            f"{_bytes(name, options.group) * channels * width / us / 1e3:.1f} GB/s)"
            for name, us in found.items()
        ]
        print(f"| {rows} | {' | '.join(cells)} |", flush=True)
    if options.output:
        record = {
            "command": f"kernel_cost --shape {options.shape} --rows {options.rows} "
            f"--group {options.group} --calls {options.calls} --build {options.build}"
            f"{' --all' if options.all else ''}",
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "us": results,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n")


def _bytes(name: str, group: int) -> float:
    """Return the bytes of a weight; a group of 4-bit ones has a zero and a multiplier."""
    return 2 if name == "bf16" else 0.5 + 2 / group if "int4" in name else 1


def load(build: str) -> None:
    """Register vLLM's ops: those for this processor, or those for one that has no AVX512."""
    if build == "native":
        registry.load_vllm_ops()
        return
    native.LEFT_OUT = ("avx512", "avxvnni", "gfni")
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    spec = importlib.util.find_spec("vllm")
    assert spec is not None, "no vLLM here"
    assert spec.origin is not None
    torch.ops.load_library(Path(spec.origin).parent / "_C_AVX2.abi3.so")


def measure(
    made: dict[str, Multiply], rows: int, width: int, copies: int, calls: int
) -> dict[str, float]:
    """Return the medians, in µs, of calls that take turns."""
    x = torch.randn(rows, width).bfloat16()
    times: dict[str, list[float]] = {name: [] for name in made}
    for call in range(calls + 1):
        for name, multiply in made.items():
            started = time.perf_counter()
            multiply(x, call % copies)
            if call:  # the first one prepares
                times[name].append((time.perf_counter() - started) * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def kernels(channels: int, width: int, group: int, copies: int, every: bool) -> dict[str, Multiply]:
    """Return name → function of (x, number of the copy)."""
    weight = torch.randn(channels, width).mul_(0.02).bfloat16()
    four = weights.to_int4(weight, group, search=False)
    eight = weights.to_int8(weight)
    int8 = [registry.int8(eight.q, eight.scales, weight.dtype) for _ in range(copies)]
    made: dict[str, Multiply] = {
        "bf16": _bf16(weight, copies),
        "int8, w8a8": lambda x, i: int8[i](x),
    }
    if registry.missing("int4"):
        return made
    parts = (four.q, four.zeros, four.multipliers, four.steps)
    int4 = [registry.int4(*parts) for _ in range(copies)]
    made["int4"] = lambda x, i: int4[i](x)
    return made | (_candidates(eight, four, group, copies) if every else {})


def _bf16(weight: torch.Tensor, copies: int) -> Multiply:
    ops = torch.ops._C
    make = ops.create_onednn_mm_handler
    try:
        handles = [torch.tensor(make(weight.t(), 32)) for _ in range(copies)]
    except RuntimeError:  # without AVX512: then vLLM, too, leaves it to torch
        plain = [weight.clone() for _ in range(copies)]
        return lambda x, i: torch.nn.functional.linear(x, plain[i])

    def multiply(x: torch.Tensor, i: int) -> torch.Tensor:
        y = x.new_empty((x.shape[0], weight.shape[0]))
        ops.onednn_mm(y, x, None, handles[i])
        return y

    return multiply


def _candidates(
    eight: weights.Int8Weight,
    four: weights.Int4Weight,
    group: int,
    copies: int,
) -> dict[str, Multiply]:
    """Return single ops of torch and vLLM, each at every number of rows."""
    ops, aten = torch.ops._C, torch.ops.aten
    plain = [eight.q.clone() for _ in range(copies)]
    packed8 = [ops.convert_weight_packed(eight.q) for _ in range(copies)]
    packed4 = [aten._convert_weight_to_int4pack_for_cpu(four.q.int(), 1) for _ in range(copies)]
    onednn = [Int8Linear(eight.q, eight.scales, torch.bfloat16) for _ in range(copies)]
    scales = eight.scales.bfloat16()
    both = torch.zeros(four.zeros.shape[1], four.zeros.shape[0], 2, dtype=torch.bfloat16)
    return {
        "onednn_scaled_mm": lambda x, i: onednn[i](x),
        "int8_scaled_mm_with_quant": lambda x, i: ops.int8_scaled_mm_with_quant(
            x, packed8[i], eight.scales, None, x.dtype, True
        ),
        "_weight_int8pack_mm": lambda x, i: torch._weight_int8pack_mm(x, plain[i], scales),
        "_weight_int4pack_mm": lambda x, i: aten._weight_int4pack_mm_for_cpu(
            x, packed4[i], group, both
        ),
    }


if __name__ == "__main__":
    main()
