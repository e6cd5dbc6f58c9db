"""A GPU's timeline without the GPU."""
