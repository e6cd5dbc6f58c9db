"""What runs inside the engine's process."""
