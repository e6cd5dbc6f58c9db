"""Guarded patches of vLLM, one module per upstream module."""
