"""Virtual time for code that asks the machine for it.

vLLM's scheduler stamps requests and outputs with `time.monotonic()`, and hosts of policies ask the
same clock. Modules look `time` up in their globals when they run, so in the simulation's process,
and nowhere else, these names are made to mean a `VirtualTime`: the module `time` with its clocks
replaced, and any of its clock functions that was imported by name.

The two clocks begin far apart, as a machine's do: code that takes one for the other is a year off.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from scalellm_plugins.simulator.timeline import Clock

MONOTONIC_ORIGIN = 1_000.0
WALL_ORIGIN = 1_000_000_000.0
"""What the clocks say at the beginning, s."""

PACKAGES = ("vllm.v1.core", "vllm.v1.engine", "vllm.v1.request", "scalellm_plugins.scheduling")
"""Modules that see virtual time, with all below them."""


class VirtualTime:
    """Stands for the module `time`; what is not a clock is the real module's."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        """Seconds, as `time.monotonic`."""
        return MONOTONIC_ORIGIN + self._clock.now()

    perf_counter = monotonic

    def monotonic_ns(self) -> int:
        """Nanoseconds, as `time.monotonic_ns`."""
        return int(self.monotonic() * 1e9)

    perf_counter_ns = monotonic_ns

    def time(self) -> float:
        """Seconds, as `time.time`."""
        return WALL_ORIGIN + self._clock.now()

    def time_ns(self) -> int:
        """Nanoseconds, as `time.time_ns`."""
        return int(self.time() * 1e9)

    def sleep(self, seconds: float) -> None:
        """As `time.sleep`, at once."""
        self._clock.sleep_until(self._clock.now() + seconds)


CLOCKS = (
    "monotonic",
    "monotonic_ns",
    "perf_counter",
    "perf_counter_ns",
    "sleep",
    "time",
    "time_ns",
)
"""Functions of the module `time` that are replaced."""


def install(virtual: VirtualTime, packages: Iterable[str] = PACKAGES) -> list[str]:
    """Let the modules of `packages` that are loaded by now see virtual time; return what changed,
    as "module.name". There is no way back: it is for a process of its own.
    """
    instead = {id(time): virtual} | {
        id(getattr(time, name)): getattr(virtual, name) for name in CLOCKS
    }
    roots = tuple(packages)
    changed = []
    for module_name, module in list(sys.modules.items()):
        if not any(module_name == root or module_name.startswith(f"{root}.") for root in roots):
            continue
        for name, value in list(vars(module).items()):
            if id(value) in instead:
                setattr(module, name, instead[id(value)])
                changed.append(f"{module_name}.{name}")
    return changed
