"""Benchmarks: measurements of whole servers and of single parts."""
