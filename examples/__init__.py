"""Runnable examples of mtl_optax. `python -m examples.compare` is the main one."""
