"""Internals: the method type, its pipeline, the task tree, the Gram matrix, and the checks."""
