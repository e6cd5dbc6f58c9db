"""The box that a simulated server prints, so that nobody takes its output for a model's."""

from __future__ import annotations

from .options import Simulation


def banner(simulated: Simulation, blocks: int, block_size: int) -> str:
    """Several lines, framed; `blocks` of `block_size` tokens is the KV cache that vLLM built."""
    roofline = simulated.roofline
    decode = roofline.step_seconds(0, 1, 1) / simulated.speed
    batch = roofline.step_seconds(0, 64, 64 * 256) / simulated.speed
    lines = [
        "SIMULATED GPU: NOTHING IS COMPUTED",
        "Tokens are made up. Only their timing means anything.",
        "",
        f"timeline   {simulated.summary}, speed × {simulated.speed:g}",
        f"step       {decode * 1e3:.2f} ms for 1 sequence, {batch * 1e3:.2f} ms for 64 short ones",
        f"floor      {roofline.floor_s / simulated.speed * 1e6:.0f} µs per step before any weights",
        f"KV cache   {blocks:,} blocks × {block_size} = {blocks * block_size:,} tokens",
        "off        leave scalellm.sim out of --plugins / VLLM_PLUGINS",
    ]
    width = max(map(len, lines))
    rule = "#" * (width + 6)
    return "\n".join([rule, *(f"## {line:<{width}} ##" for line in lines), rule])
