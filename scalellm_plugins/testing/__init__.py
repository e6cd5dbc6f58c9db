"""For tests of what others write: whether a scheduling policy keeps its promises.

Needs neither vLLM nor pytest.
"""
