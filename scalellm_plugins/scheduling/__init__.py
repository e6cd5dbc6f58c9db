"""What runs inside the engine's scheduler. Needs vLLM; imported by it alone."""
