"""Wrappers of optax transformations: over the task axis, over steps, against what is not finite."""
