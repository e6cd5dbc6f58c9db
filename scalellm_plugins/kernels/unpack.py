"""4-bit weights to 8-bit ones, block after block, on the threads of torch's OpenMP team.

With many rows arithmetic binds, and int8 dot products want int8 weights. No op of torch or vLLM
unpacks groups at the speed of memory, so this one loop is compiled here when it is first needed: by
llvmlite, which comes with vLLM (numba needs it), from the few lines of LLVM code below. No compiler
is needed, and the wheel stays pure Python. Vectors are explicit, so nothing hangs on what an
optimiser recognises; on processors without AVX512 LLVM splits them.

Input: the blocks of `int4_linear.py`. Output: those of vLLM's `int8_scaled_mm_with_quant`, which
are [K/4, 32, 4] bytes (k, channel, k) per 32 channels, and 32 sums as int32 that are not touched.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

_FIELDS = (
    "source",
    "target",
    "multipliers",
    "offsets",
    "blocks",  # of 32 channels
    "parts",  # of K, per block of channels
    "quads",  # of K, per part
    "parts_per_group",
)


@functools.cache
def available() -> bool:
    """Whether the loop can be compiled and run on torch's threads here."""
    try:
        _compiled()
    except (ImportError, OSError, AttributeError, RuntimeError):
        return False
    return True


def unpack(
    weight: torch.Tensor,
    multipliers: torch.Tensor,
    offsets: torch.Tensor,
    target: torch.Tensor,
    depth: int,
) -> None:
    """Write q · multiplier + offset, modulo 256, of every weight into `target`.

    Args:
        weight: uint8 [N / 32, K / depth, depth · 16 + 128].
        multipliers, offsets: int8 [N / 32, groups, 32]; an offset is -zero · multiplier.
        target: int8 [N / 32, K · 32 + 128].
        depth: of K in a part of a block, a multiple of 4.
    """
    blocks, parts, _ = weight.shape
    values = (
        weight.data_ptr(),
        target.data_ptr(),
        multipliers.data_ptr(),
        offsets.data_ptr(),
        blocks,
        parts,
        depth // 4,
        parts // multipliers.shape[1],
    )
    arguments = (ctypes.c_int64 * len(_FIELDS))(*values)
    run, team = _compiled()
    run(team, ctypes.addressof(arguments), min(torch.get_num_threads(), blocks), 0)


@functools.cache
def _compiled() -> tuple[Any, int]:
    """Return OpenMP's function that runs a team, and the address of what each thread is to run."""
    import llvmlite.binding as llvm

    # The runtime that torch has loaded: a second one would bring threads of its own.
    process = ctypes.CDLL(None)
    run = process.GOMP_parallel
    run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    run.restype = None
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        address = ctypes.cast(getattr(process, name), ctypes.c_void_p).value
        llvm.add_symbol(name, address)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(_code())
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _kept.append(engine)  # it owns the code
    return run, engine.get_function_address("team")


_kept: list[Any] = []


def _code() -> str:
    """Return the loop in LLVM's language. The names of the values are those of `_FIELDS`."""
    fields = "\n".join(
        f"  %p{i} = getelementptr i64, ptr %arguments, i64 {i}\n  %{name} = load i64, ptr %p{i}"
        for i, name in enumerate(_FIELDS)
    )
    # A channel's number for each of the four bytes of k that it has.
    spread = ", ".join(f"i32 {lane // 4}" for lane in range(64))
    joined = ", ".join(f"i32 {lane}" for lane in range(64))
    low_bits, shift = (f"<{', '.join([f'i8 {value}'] * 32)}>" for value in (15, 4))
    per_half = "\n".join(
        f"""
  %m{half}at = getelementptr i8, ptr %group_multipliers, i64 {half * 16}
  %m{half}few = load <16 x i8>, ptr %m{half}at, align 1
  %m{half} = shufflevector <16 x i8> %m{half}few, <16 x i8> poison, <64 x i32> <{spread}>
  %o{half}at = getelementptr i8, ptr %group_offsets, i64 {half * 16}
  %o{half}few = load <16 x i8>, ptr %o{half}at, align 1
  %o{half} = shufflevector <16 x i8> %o{half}few, <16 x i8> poison, <64 x i32> <{spread}>"""
        for half in (0, 1)
    )
    step = "\n".join(
        f"""
  %in{half} = getelementptr i8, ptr %from, i64 {half * 32}
  %bytes{half} = load <32 x i8>, ptr %in{half}, align 1
  %low{half} = and <32 x i8> %bytes{half}, {low_bits}
  %high{half} = lshr <32 x i8> %bytes{half}, {shift}
  %q{half} = shufflevector <32 x i8> %low{half}, <32 x i8> %high{half}, <64 x i32> <{joined}>
  %scaled{half} = mul <64 x i8> %q{half}, %m{half}
  %out{half} = add <64 x i8> %scaled{half}, %o{half}
  %to{half} = getelementptr i8, ptr %to, i64 {half * 64}
  store <64 x i8> %out{half}, ptr %to{half}, align 1"""
        for half in (0, 1)
    )
    return f"""
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()

define void @team(ptr %arguments) {{
entry:
{fields}
  %number32 = call i32 @omp_get_thread_num()
  %threads32 = call i32 @omp_get_num_threads()
  %number = zext i32 %number32 to i64
  %threads = zext i32 %threads32 to i64
  %begin_of = mul i64 %blocks, %number
  %begin = udiv i64 %begin_of, %threads
  %next = add i64 %number, 1
  %end_of = mul i64 %blocks, %next
  %end = udiv i64 %end_of, %threads
  %source_base = inttoptr i64 %source to ptr
  %target_base = inttoptr i64 %target to ptr
  %multipliers_base = inttoptr i64 %multipliers to ptr
  %offsets_base = inttoptr i64 %offsets to ptr
  %groups = udiv i64 %parts, %parts_per_group
  %part_in_bytes = mul i64 %quads, 64
  %part_in = add i64 %part_in_bytes, 128
  %part_out = mul i64 %quads, 128
  %block_out_bytes = mul i64 %parts, %part_out
  %block_out = add i64 %block_out_bytes, 128
  %some = icmp ult i64 %begin, %end
  br i1 %some, label %block, label %done
block:
  %b = phi i64 [ %begin, %entry ], [ %b_next, %block_end ]
  br label %part
part:
  %p = phi i64 [ 0, %block ], [ %p_next, %part_end ]
  %group_in_block = udiv i64 %p, %parts_per_group
  %groups_before = mul i64 %b, %groups
  %group = add i64 %groups_before, %group_in_block
  %group_at = mul i64 %group, 32
  %group_multipliers = getelementptr i8, ptr %multipliers_base, i64 %group_at
  %group_offsets = getelementptr i8, ptr %offsets_base, i64 %group_at
{per_half}
  %parts_before = mul i64 %b, %parts
  %part_number = add i64 %parts_before, %p
  %part_from_at = mul i64 %part_number, %part_in
  %part_from = getelementptr i8, ptr %source_base, i64 %part_from_at
  %block_to_at = mul i64 %b, %block_out
  %part_to_in = mul i64 %p, %part_out
  %part_to_at = add i64 %block_to_at, %part_to_in
  %part_to = getelementptr i8, ptr %target_base, i64 %part_to_at
  br label %quad
quad:
  %k = phi i64 [ 0, %part ], [ %k_next, %quad ]
  %from_at = mul i64 %k, 64
  %from = getelementptr i8, ptr %part_from, i64 %from_at
  %to_at = mul i64 %k, 128
  %to = getelementptr i8, ptr %part_to, i64 %to_at
{step}
  %k_next = add i64 %k, 1
  %more_quads = icmp ult i64 %k_next, %quads
  br i1 %more_quads, label %quad, label %part_end
part_end:
  %p_next = add i64 %p, 1
  %more_parts = icmp ult i64 %p_next, %parts
  br i1 %more_parts, label %part, label %block_end
block_end:
  %b_next = add i64 %b, 1
  %more_blocks = icmp ult i64 %b_next, %end
  br i1 %more_blocks, label %block, label %done
done:
  ret void
}}
"""
