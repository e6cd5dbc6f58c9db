"""What loading holds at most, and what is left: resident memory, as the system counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from scalellm_plugins.config import QuantizationConfig
from scalellm_plugins.kernels import registry
from scalellm_plugins.quantization import rules

pytestmark = pytest.mark.vllm

LAYERS, CHANNELS, WIDTH = 8, 2048, 4096
LAYER_MB = CHANNELS * WIDTH * 2 / 1e6
TEMPORARIES_MB = 40
"""Float32 copies of the 2^20 weights that are rounded at a time, and what malloc keeps."""


def resident_mb(key: str) -> float:
    """A line of this process's status: VmRSS is now, VmHWM the most since `clear_refs`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def layers(count: int) -> list[torch.nn.Module]:
    """Layers in bf16, of which every page has been written."""
    weight = torch.randn(CHANNELS, WIDTH).bfloat16()
    made = [torch.nn.Module() for _ in range(count)]
    for layer in made:
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return made


@pytest.mark.parametrize("bits", [8, 4])
def test_loading_holds_one_layer_more_than_bf16(bits: Literal[8, 4]) -> None:
    registry.load_vllm_ops()
    if why := registry.missing("int4" if bits == 4 else "int8"):
        pytest.skip(why)
    from scalellm_plugins.quantization.methods import QuantizedLinear

    method = QuantizedLinear(rules.Plan(bits, 128), QuantizationConfig())
    method.process_weights_after_loading(layers(1)[0])  # threads and code are there from now on
    model = layers(LAYERS)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb("VmRSS:")
    for layer in model:
        method.process_weights_after_loading(layer)
    assert resident_mb("VmHWM:") - before < LAYER_MB + TEMPORARIES_MB
    saved = before - resident_mb("VmRSS:")
    assert saved > 0.9 * LAYERS * LAYER_MB * (1 - bits / 16), "freed, but not given back"
