"""The GPU kernels without a GPU, each way in a process of its own: this one must not meet Triton.

Right, by Triton's interpreter (`gpu_kernels.py`); compilable, by Triton's compiler
(`gpu_compile.py`). On a machine with a GPU, they run there, too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TRITON = next((ROOT / ".cache").glob("triton-*"), None)
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Of shared memory, bytes per block (CUDA programming guide, compute capabilities)."""

needs_triton = pytest.mark.skipif(TRITON is None, reason="no Triton: python tools/fetch_triton.py")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    there = {**os.environ, "PYTHONPATH": str(TRITON or ""), **environment}
    there.pop("TRITON_INTERPRET", None)
    there.update(environment)
    return subprocess.run(
        [sys.executable, *command], check=False, capture_output=True, text=True, env=there, cwd=ROOT
    )


@needs_triton
def test_right_in_the_interpreter() -> None:
    done = run("-m", "pytest", "-q", "-W", "ignore", "tests/gpu_kernels.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cache = str(tmp_path_factory.mktemp("triton"))
    done = run("-m", "tests.gpu_compile", TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_triton
def test_compiled_for_every_architecture(compiled: list[dict[str, Any]]) -> None:
    """No register goes to memory, and each block fits its multiprocessor."""
    assert {one["sm"] for one in compiled} == {80, 89, 90}
    for one in compiled:
        assert one["stack"] == 0, one
        assert one["shared"] <= SHARED_LIMIT[one["sm"]], one


@needs_triton
def test_products_are_the_tensor_cores_own(compiled: list[dict[str, Any]]) -> None:
    """8-bit rows are multiplied as such, and many rows on Hopper by its own instruction."""
    for one in compiled:
        kinds = " ".join(one["products"])
        if one["rows"] is None:
            assert not kinds, one
        elif one["kernel"] == "w8a8 i8":
            assert "s8.s8" in kinds, one
        elif one["kernel"] == "w8a8 fp8e4nv" and one["rows"] >= 64:
            assert "e4m3" in kinds, one
        else:
            assert kinds, one
        if one["sm"] == 90 and (one["rows"] or 0) >= 64:
            assert "wgmma" in kinds, one


def test_nothing_imports_triton_until_a_gpu_asks() -> None:
    code = (
        "import sys\n"
        "from scalellm_plugins.kernels import registry, reference\n"
        "sys.exit('triton' in sys.modules or 'scalellm_plugins.kernels.gpu.linear' in sys.modules)"
    )
    assert run("-c", code).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not Path("/dev/nvidiactl").exists(),
    reason="no GPU",
)
def test_right_on_the_gpu() -> None:
    done = run("-m", "pytest", "-q", "tests/gpu_kernels.py", PYTHONPATH="")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
