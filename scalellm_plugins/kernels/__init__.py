"""Linear layers with 8-bit and 4-bit weights, one op per file; `reference.py` is their oracle.

Importable without vLLM. Its compiled ops (`torch.ops._C`) are used where they are registered, and
`registry.py` says which they are.
"""
