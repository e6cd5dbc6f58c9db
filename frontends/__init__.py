"""Processes and HTTP: what runs inside the API servers."""
