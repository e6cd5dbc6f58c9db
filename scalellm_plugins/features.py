"""The features: what each does, whether it is built yet, and when it can be on.

This is the one table that the start-up log, `scalellm doctor`, `/scalellm/features` and the
README's table (held to it by a test) are made from. Pure data: imports neither vLLM nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SUPPORTED_VLLM = ">=0.29,<0.34"
"""vLLM releases whose seams the contracts are checked against."""

Status = Literal["ready", "partial", "planned"]
"""ready: does what its line says; partial: the line says which part is built; planned: none."""


@dataclass(frozen=True)
class Feature:
    """One part of the plugin that can be switched by itself.

    `default` says whether a bare `--plugins scalellm` turns it on; the simulated GPU must be asked
    for by name, since it computes nothing. `patches` are names in `patches/registry.py`.
    """

    name: str
    summary: str
    status: Status
    default: bool = True


FEATURES: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature(
            "status",
            "GET /scalellm/features: which features are on in this server, and why",
            "ready",
        ),
        Feature(
            "frontend",
            "HTTP workers that follow demand, replaced when they die; a fast lane in each",
            "ready",
        ),
        Feature("ipc", "shared-memory columns between frontends and the engine", "ready"),
        Feature(
            "scheduler",
            "a lean decode step for an eighth of the CPU; policies, deadlines, tenants' limits",
            "ready",
        ),
        Feature(
            "quantization",
            "int8 and int4 on CPUs: --quantization scalellm_int4; quantized checkpoints, faster",
            "ready",
        ),
        Feature(
            "sim",
            "a simulated GPU: its timeline without its arithmetic, for benchmarks",
            "ready",
            default=False,
        ),
    )
}
