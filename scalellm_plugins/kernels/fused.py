"""4-bit weights times many rows: unpacked to 8 bits in the cache, and multiplied from there.

With many rows arithmetic binds, and int8 dot products want int8 weights. Unpacking them to memory
for an int8 op costs half of what that saves, so 32 channels are unpacked at a time into scratch
that stays in the core's cache (K x 32 bytes), and every tile of rows is multiplied from there.

No op of torch or vLLM does that with groups, so this one is compiled here when it is first needed,
in 60 ms: by llvmlite, which comes with vLLM (numba needs it), from the LLVM code below. No compiler
is needed, and the wheel stays pure Python. Vectors are explicit: nothing hangs on what an optimiser
recognises. It runs on the threads of torch's own OpenMP team, and needs AVX512 with VNNI and bf16:
the processors of vLLM's build that has the other 4-bit ops.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

TILE = 8
"""Rows that are multiplied together: 16 sums in registers, enough to keep two units busy."""

_FIELDS = (
    "source",  # uint8 [blocks, parts, quads * 64 + 128], see int4_linear.py
    "multipliers",  # int8 [blocks, groups, 32]
    "offsets",  # int8 [blocks, groups, 32]: -zero * multiplier, modulo 256
    "sums",  # int32 [blocks, 32]: 128 times the sum of a channel
    "steps",  # float32 [blocks, 32]
    "bias",  # float32 [blocks, 32]
    "rows",  # uint8 [tiles * TILE, K]: rounded and moved up by 128
    "row_steps",  # float32 [tiles * TILE]
    "out",  # bfloat16 [tiles * TILE, blocks * 32]
    "scratch",  # int8 [threads, K * 32]
    "blocks",
    "parts",
    "quads",
    "parts_per_group",
    "tiles",
)
_FEATURES = ("avx512f", "avx512bw", "avx512vnni", "avx512bf16")


@functools.cache
def available() -> bool:
    """Whether the kernel can be compiled for this processor and run on torch's threads."""
    try:
        _compiled()
    except (ImportError, OSError, AttributeError, RuntimeError):
        return False
    return True


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    multipliers: torch.Tensor,
    offsets: torch.Tensor,
    sums: torch.Tensor,
    steps: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return y bfloat16 [M, N] for x bfloat16 [M, K]; the other tensors are those of `_FIELDS`."""
    blocks, parts, size = weight.shape
    count, width = x.shape
    tiles = -(-count // TILE)
    rows = torch.empty((tiles * TILE, width), dtype=torch.int8)
    row_steps = torch.empty((tiles * TILE, 1), dtype=torch.float32)
    torch.ops._C.dynamic_scaled_int8_quant(rows[:count], x, row_steps[:count], None)
    # What is in the rows that fill the last tile up does not matter: theirs are thrown away.
    rows.view(torch.uint8).bitwise_xor_(128)
    y = torch.empty((tiles * TILE, blocks * 32), dtype=torch.bfloat16)
    bias = torch.zeros_like(steps) if bias is None else bias.contiguous()
    threads = min(torch.get_num_threads(), blocks)
    scratch = torch.empty((threads, width * 32), dtype=torch.int8)
    tensors = (weight, multipliers, offsets, sums, steps, bias, rows, row_steps, y, scratch)
    numbers = (blocks, parts, (size - 128) // 64, parts // multipliers.shape[1], tiles)
    values = (*(tensor.data_ptr() for tensor in tensors), *numbers)
    arguments = (ctypes.c_int64 * len(_FIELDS))(*values)
    run, team = _compiled()
    run(team, ctypes.addressof(arguments), threads, 0)
    return y[:count]


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
    features = llvm.get_host_cpu_features()
    if not all(features.get(name) for name in _FEATURES):
        raise RuntimeError(f"needs {', '.join(_FEATURES)}")
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(_code()), machine)
    engine.finalize_object()
    _kept.append(engine)  # it owns the code
    return run, engine.get_function_address("team")


_kept: list[Any] = []

# ---- The code ---------------------------------------------------------------------------------


def _at(name: str, base: str, offset: str) -> str:
    return f"  %{name} = getelementptr i8, ptr {base}, i64 {offset}\n"


def _unpacking() -> tuple[str, str]:
    """Return code for a group's multipliers and offsets, and for 4 of K in 32 channels."""
    lanes = ", ".join(f"i32 {lane // 4}" for lane in range(64))  # four bytes of K per channel
    joined = ", ".join(f"i32 {lane}" for lane in range(64))
    ones, shift = (f"<{', '.join([f'i8 {value}'] * 32)}>" for value in (15, 4))
    group, step = "", ""
    for half in (0, 1):
        for name in ("multipliers", "offsets"):
            group += _at(f"{name}{half}at", f"%group_{name}", str(half * 16))
            group += f"""
  %{name}{half}few = load <16 x i8>, ptr %{name}{half}at, align 1
  %{name}{half} = shufflevector <16 x i8> %{name}{half}few, <16 x i8> poison, <64 x i32> <{lanes}>
"""
        step += _at(f"in{half}", "%from", str(half * 32)) + _at(f"to{half}", "%to", str(half * 64))
        step += f"""
  %bytes{half} = load <32 x i8>, ptr %in{half}, align 1
  %low{half} = and <32 x i8> %bytes{half}, {ones}
  %high{half} = lshr <32 x i8> %bytes{half}, {shift}
  %q{half} = shufflevector <32 x i8> %low{half}, <32 x i8> %high{half}, <64 x i32> <{joined}>
  %scaled{half} = mul <64 x i8> %q{half}, %multipliers{half}
  %whole{half} = add <64 x i8> %scaled{half}, %offsets{half}
  store <64 x i8> %whole{half}, ptr %to{half}, align 1
"""
    return group, step


def _multiplying() -> tuple[str, str, str]:
    """Return code for a tile's sums (phis), for 4 of K in it, and for its end: to bf16."""
    sums, step, end = "", "", ""
    for half in (0, 1):
        step += _at(f"w{half}at", "%w_at", str(half * 64))
        step += f"  %w{half} = load <16 x i32>, ptr %w{half}at, align 1\n"
        for name, kind in (("sums", "i32"), ("steps", "float"), ("bias", "float")):
            end += _at(f"{name}{half}at", f"%block_{name}", str(half * 64))
            end += f"  %{name}{half} = load <16 x {kind}>, ptr %{name}{half}at, align 1\n"
    for row in range(TILE):
        step += f"  %a_off{row} = mul i64 %width, {row}\n" + _at(
            f"a{row}at", "%a_at", f"%a_off{row}"
        )
        step += f"  %a{row}one = load i32, ptr %a{row}at, align 1\n" + _splat(f"a{row}", "i32")
        end += _at(f"rs{row}at", "%tile_row_steps", str(row * 4))
        end += f"  %rs{row}one = load float, ptr %rs{row}at, align 1\n" + _splat(
            f"rs{row}", "float"
        )
        end += f"  %y_off{row} = mul i64 %out_row, {row}\n" + _at(
            f"y{row}", "%y_at", f"%y_off{row}"
        )
        for half in (0, 1):
            name = f"{row}_{half}"
            sums += (
                f"  %s{name} = phi <16 x i32> [ zeroinitializer, %tile ], [ %n{name}, %inner ]\n"
            )
            step += (
                f"  %n{name} = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512("
                f"<16 x i32> %s{name}, <16 x i32> %a{row}, <16 x i32> %w{half})\n"
            )
            end += f"""
  %d{name} = sub <16 x i32> %n{name}, %sums{half}
  %f{name} = sitofp <16 x i32> %d{name} to <16 x float>
  %r{name} = fmul <16 x float> %f{name}, %rs{row}
  %t{name} = fmul <16 x float> %r{name}, %steps{half}
  %u{name} = fadd <16 x float> %t{name}, %bias{half}
  %b{name} = fptrunc <16 x float> %u{name} to <16 x bfloat>
  %p{name} = getelementptr i8, ptr %y{row}, i64 {half * 32}
  store <16 x bfloat> %b{name}, ptr %p{name}, align 1
"""
    return sums, step, end


def _splat(name: str, kind: str) -> str:
    return (
        f"  %{name}first = insertelement <16 x {kind}> poison, {kind} %{name}one, i64 0\n"
        f"  %{name} = shufflevector <16 x {kind}> %{name}first, <16 x {kind}> poison, "
        "<16 x i32> zeroinitializer\n"
    )


def _code() -> str:
    """Return the kernel in LLVM's language. The names of its values are those of `_FIELDS`."""
    fields = ""
    for number, name in enumerate(_FIELDS):
        fields += f"  %p{number} = getelementptr i64, ptr %arguments, i64 {number}\n"
        kind = "ptr" if number < _FIELDS.index("blocks") else "i64"
        fields += f"  %{name} = load {kind}, ptr %p{number}\n"
    group, unpack = _unpacking()
    sums, multiply, end = _multiplying()
    return f"""
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)

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
  %groups = udiv i64 %parts, %parts_per_group
  %part_bytes = mul i64 %quads, 64
  %part_in = add i64 %part_bytes, 128
  %part_out = mul i64 %quads, 128
  %all_quads = mul i64 %parts, %quads
  %width = mul i64 %all_quads, 4
  %scratch_size = mul i64 %width, 32
  %scratch_at = mul i64 %number, %scratch_size
  %own = getelementptr i8, ptr %scratch, i64 %scratch_at
  %out_row = mul i64 %blocks, 64
  %tile_rows = mul i64 %width, {TILE}
  %tile_out = mul i64 %out_row, {TILE}
  %some = icmp ult i64 %begin, %end
  br i1 %some, label %block, label %done
block:
  %b = phi i64 [ %begin, %entry ], [ %b_next, %block_end ]
  %block_at = mul i64 %b, 128
  %block_sums = getelementptr i8, ptr %sums, i64 %block_at
  %block_steps = getelementptr i8, ptr %steps, i64 %block_at
  %block_bias = getelementptr i8, ptr %bias, i64 %block_at
  br label %part
part:
  %p = phi i64 [ 0, %block ], [ %p_next, %part_end ]
  %group_in_block = udiv i64 %p, %parts_per_group
  %groups_before = mul i64 %b, %groups
  %group = add i64 %groups_before, %group_in_block
  %group_at = mul i64 %group, 32
  %group_multipliers = getelementptr i8, ptr %multipliers, i64 %group_at
  %group_offsets = getelementptr i8, ptr %offsets, i64 %group_at
{group}
  %parts_before = mul i64 %b, %parts
  %part_number = add i64 %parts_before, %p
  %part_from_at = mul i64 %part_number, %part_in
  %part_from = getelementptr i8, ptr %source, i64 %part_from_at
  %part_to_at = mul i64 %p, %part_out
  %part_to = getelementptr i8, ptr %own, i64 %part_to_at
  br label %quad
quad:
  %k = phi i64 [ 0, %part ], [ %k_next, %quad ]
  %from_at = mul i64 %k, 64
  %from = getelementptr i8, ptr %part_from, i64 %from_at
  %to_at = mul i64 %k, 128
  %to = getelementptr i8, ptr %part_to, i64 %to_at
{unpack}
  %k_next = add i64 %k, 1
  %more_quads = icmp ult i64 %k_next, %quads
  br i1 %more_quads, label %quad, label %part_end
part_end:
  %p_next = add i64 %p, 1
  %more_parts = icmp ult i64 %p_next, %parts
  br i1 %more_parts, label %part, label %tiling
tiling:
  br label %tile
tile:
  %t = phi i64 [ 0, %tiling ], [ %t_next, %tile_end ]
  %rows_at = mul i64 %t, %tile_rows
  %tile_at = getelementptr i8, ptr %rows, i64 %rows_at
  %row_steps_at = mul i64 %t, {TILE * 4}
  %tile_row_steps = getelementptr i8, ptr %row_steps, i64 %row_steps_at
  br label %inner
inner:
  %i = phi i64 [ 0, %tile ], [ %i_next, %inner ]
{sums}
  %w_off = mul i64 %i, 128
  %w_at = getelementptr i8, ptr %own, i64 %w_off
  %a_off = mul i64 %i, 4
  %a_at = getelementptr i8, ptr %tile_at, i64 %a_off
{multiply}
  %i_next = add i64 %i, 1
  %more_inner = icmp ult i64 %i_next, %all_quads
  br i1 %more_inner, label %inner, label %tile_end
tile_end:
  %y_rows = mul i64 %t, %tile_out
  %y_block = mul i64 %b, 64
  %y_off = add i64 %y_rows, %y_block
  %y_at = getelementptr i8, ptr %out, i64 %y_off
{end}
  %t_next = add i64 %t, 1
  %more_tiles = icmp ult i64 %t_next, %tiles
  br i1 %more_tiles, label %tile, label %block_end
block_end:
  %b_next = add i64 %b, 1
  %more_blocks = icmp ult i64 %b_next, %end
  br i1 %more_blocks, label %block, label %done
done:
  ret void
}}
"""
