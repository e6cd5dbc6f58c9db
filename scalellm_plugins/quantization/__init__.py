"""Quantization of a plain 16-bit checkpoint while vLLM loads it, over the kernels of `kernels/`."""
