"""Kernels that are compiled here when they are first needed, and run on torch's threads.

By llvmlite, which comes with vLLM (numba needs it), from LLVM code that `tiles.py` and its users
write. No compiler is needed, and the wheel stays pure Python. Vectors are explicit: nothing hangs
on what an optimiser recognises. A kernel is a function `team(arguments)` that every thread of
torch's own OpenMP team runs; it splits the work by its number.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

Run = Callable[[Sequence[int], int], None]
"""Run a kernel for (arguments, threads): addresses and numbers, an array of 64-bit integers."""

_OPENMP = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")

LEFT_OUT: tuple[str, ...] = ()
"""Beginnings of features that kernels go without: a benchmark holds them to an older processor."""

DECLARED = """
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()
declare void @GOMP_barrier()
"""
"""What a kernel may call."""


def compiled(code: str, needs: Sequence[str]) -> Run:
    """Compile a kernel for this processor, which has to have the features that it needs.

    Raises:
        ImportError, OSError, AttributeError, RuntimeError: there is no llvmlite, or no OpenMP that
            torch runs on, or a feature is missing.
    """
    import llvmlite.binding as llvm

    team = _team()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    for name in [name for name in features if name.startswith(LEFT_OUT)]:
        features[name] = False
    if absent := [name for name in needs if not features.get(name)]:
        raise RuntimeError(f"the processor lacks {', '.join(absent)}")
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(code), machine)
    engine.finalize_object()
    _kept.append(engine)  # it owns the code
    address = engine.get_function_address("team")

    alone = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(address)

    def run(arguments: Sequence[int], threads: int) -> None:
        # Bytes, for an array of ctypes costs a call 1 µs more.
        packed = _layout(len(arguments)).pack(*arguments)
        if threads == 1:
            alone(packed)  # there the thread's number is 0, too
        else:
            team(address, packed, threads, 0)

    return run


@functools.cache
def _layout(count: int) -> struct.Struct:
    return struct.Struct(f"{count}q")


def works(make: Callable[[], Run]) -> bool:
    """Whether a kernel can be compiled for this processor and run on torch's threads."""
    try:
        make()
    except (ImportError, OSError, AttributeError, RuntimeError):
        return False
    return True


@functools.cache
def _team() -> Any:
    """Return OpenMP's function that runs a team, of the runtime that torch has loaded.

    A second runtime would bring threads of its own.
    """
    import llvmlite.binding as llvm

    process = ctypes.CDLL(None)
    for name in _OPENMP:
        llvm.add_symbol(name, ctypes.cast(getattr(process, name), ctypes.c_void_p).value)
    run = process.GOMP_parallel
    run.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint)
    run.restype = None
    return run


_kept: list[Any] = []
