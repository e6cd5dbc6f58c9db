"""GPU kernels through Triton's compiler, without a GPU: what an A100 and an H100 would run.

Prints one line of JSON per kernel and architecture; `test_kernels_gpu.py` reads them.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scalellm_plugins.kernels.gpu import (
    int4_weight_only,
    int8_weight_only,
    rms_norm_round,
    rounding,
    swiglu_round,
    w8a8,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PRODUCT = {
    "x": "*bf16",
    "bias": "*fp32",
    "y": "*bf16",
    "parts": "*fp32",
    "counters": "*i32",
    "steps": "*fp32",
    "scales": "*fp32",
    "row_scales": "*fp32",
    "words": "*i32",
    "zeros": "*i8",
    "multipliers": "*i8",
    "rows": "i32",
    "channels": "i32",
    "width": "i32",
}
ROW = {"x": "*bf16", "residual": "*bf16", "weight": "*bf16", "epsilon": "fp32", "width": "i32"}


def cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Name, kernel, types, constants, warps, the least architecture."""
    found: list[Any] = []
    for rows, channels, split in ((16, 64, 4), (32, 64, 4), (64, 128, 1), (128, 128, 1)):
        tile = {"SPLIT": split, "ROWS": rows, "CHANNELS": channels, "HAS_BIAS": True}
        warps = 4 if rows <= 32 else 8
        four = {**tile, "GROUP": 128}
        if rows <= 64:
            found.append(("int4", int4_weight_only._multiply, PRODUCT, four, warps, 80))
        eight = {**tile, "STEP": int8_weight_only.STEP}
        types = {**PRODUCT, "q": "*i8"}
        found.append(("int8", int8_weight_only._multiply, types, eight, warps, 80))
        for kind, least in (("i8", 80), ("fp8e4nv", 89)):
            few = rows <= w8a8.FUSED
            types = {**PRODUCT, "weight": f"*{kind}", "x": "*bf16" if few else f"*{kind}"}
            constants = {**tile, "ROUND": few, "STEP": w8a8.STEP}
            found.append((f"w8a8 {kind}", w8a8._multiply, types, constants, warps, least))
    for kind, least in (("i8", 80), ("fp8e4nv", 89)):
        types = {**ROW, "q": f"*{kind}", "scales": "*fp32"}
        wide = {"LENGTH": 8192}
        found += [
            (f"round {kind}", rounding._round_row, types, wide, 16, least),
            (f"norm {kind}", rms_norm_round._norm_row, types, {**wide, "ADD": True}, 16, least),
            (f"swiglu {kind}", swiglu_round._gate_row, types, wide, 16, least),
        ]
    return found


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, sm: int):
    """Return the compiled kernel; pointers and sizes are multiples of 16, as in a model."""
    signature, fixed, hints = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[(place,)] = "constexpr", constants[name]
        else:
            signature[name] = types[name]
            if signature[name].startswith("*") or name in ("channels", "width"):
                hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, hints)
    options = {"num_warps": warps, "num_stages": 4}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers per thread and bytes of stack (spilled registers) of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"\b(REG|STACK):(\d+)", said))
    return {"registers": int(usage["REG"]), "stack": int(usage["STACK"])}


def main() -> None:
    """Compile everything for every architecture that it is for."""
    for name, kernel, types, constants, warps, least in cases():
        for sm in (80, 89, 90):
            if sm < least:
                continue
            made = compiled(kernel, types, constants, warps, sm)
            products = re.findall(r"\b((?:wgmma\.mma_async|mma)\.sync\.[\w.:]+)", made.asm["ptx"])
            line = {"kernel": name, "rows": constants.get("ROWS"), "sm": sm}
            line |= resources(made.asm["cubin"])
            line |= {"shared": made.metadata.shared, "products": sorted(set(products))}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
