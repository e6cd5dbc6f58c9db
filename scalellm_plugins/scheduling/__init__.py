"""What runs inside the engine's scheduler: the lean step, policies and their queue."""
