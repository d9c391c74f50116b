"""Wrappers of optax transformations: per task, over several steps, and against non-finite numbers."""
