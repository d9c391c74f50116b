"""The extra arguments of `update` that several rules read: `gram=` and `order=`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mtl_optax.core.rule import StepInputs


def step_key(seed: int | jax.Array, inputs: StepInputs) -> jax.Array:
    """Returns the random key of a step, so that a state needs no key."""
    return jax.random.fold_in(jax.random.key(seed), inputs.step)


def given_gram(name: str, inputs: StepInputs) -> jax.Array | None:
    """Returns the extra argument `gram`, `[T, T]`, with 0 for inactive tasks; None if it is not given.

    Entry (s, t) is the inner product of the gradient of task s on one batch and that of task t on another
    batch. The matrix is therefore not symmetric in general, and its diagonal can be negative.
    """
    gram, num_tasks = inputs.extra["gram"], len(inputs.active)
    if gram is None:
        return None
    if np.shape(gram) != (num_tasks, num_tasks):
        raise ValueError(
            f"{name}: gram= must have shape ({num_tasks}, {num_tasks}): inner products of the task "
            f"gradients of one batch (rows) with those of another; found {np.shape(gram)}."
        )
    both = inputs.active[:, None] & inputs.active[None, :]
    return jnp.where(both, jnp.asarray(gram), 0).astype(inputs.norms.dtype)


def projection_order(name: str, order: str, seed: int | jax.Array, inputs: StepInputs) -> jax.Array:
    """Returns integers `[T, T]`: gradient i is projected on the other gradients in the order of row i.

    The extra argument `order` of `update`, if given, replaces the result. "cyclic" starts row i with task
    i + 1; "random" shuffles every row at every step. Row i also contains i, which the rules skip.
    """
    given, num_tasks = inputs.extra["order"], len(inputs.active)
    if given is not None:
        if np.shape(given) != (num_tasks, num_tasks) or not jnp.issubdtype(
            jnp.result_type(given), jnp.integer
        ):
            raise ValueError(
                f"{name}: order= must be integers of shape ({num_tasks}, {num_tasks}), row i the order "
                f"in which gradient i is projected on the others; found {jnp.result_type(given)} "
                f"{np.shape(given)}."
            )
        return jnp.asarray(given)
    ascending = jnp.arange(num_tasks, dtype=jnp.int32)
    if order == "cyclic":
        return (ascending[:, None] + 1 + ascending[None, :]) % num_tasks
    rows = jnp.broadcast_to(ascending[None, :], (num_tasks, num_tasks))
    return jax.random.permutation(step_key(seed, inputs), rows, axis=1, independent=True)
