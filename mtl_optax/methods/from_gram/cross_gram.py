"""Inner products between gradients of two batches, for methods that want independent samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtl_optax.from_rule import Evidence


def given_gram(name: str, num_tasks: int, evidence: Evidence) -> jax.Array | None:
    """The extra argument `gram` of `update`, `[T, T]`, without absent tasks; None where not given.

    Entry (s, t) is the inner product of task s's gradient on one batch and task t's on another, so that
    it need not be symmetric, and its diagonal can be negative.
    """
    gram = None if evidence.extra is None else evidence.extra.get("gram")
    if gram is None:
        return None
    if jnp.shape(gram) != (num_tasks, num_tasks):
        raise ValueError(
            f"{name}: gram= must have shape ({num_tasks}, {num_tasks}): inner products of the task "
            f"gradients of one batch (rows) with those of another; found {jnp.shape(gram)}."
        )
    both = evidence.active[:, None] & evidence.active[None, :]
    return jnp.where(both, jnp.asarray(gram), 0).astype(evidence.norms.dtype)
