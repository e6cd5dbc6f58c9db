"""Kernels for GPUs, in Triton: one op per file, each tested against `reference.py`.

Without a GPU they run in Triton's interpreter (TRITON_INTERPRET=1 before anything imports Triton),
which is exact about what they compute and says nothing about how fast. Nothing here is imported
until a GPU's kernel is asked for: vLLM's CPU server must not meet Triton.
"""
