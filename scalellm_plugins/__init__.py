"""Plugins for vLLM that remove the bottlenecks of LLM serving outside the model.

Importing this package is cheap (a test holds it to that) and changes nothing: what vLLM calls is in
`plugin.py`, and it acts only when `--plugins scalellm` or `VLLM_PLUGINS` asks for it.
"""

__version__ = "0.1.0"
