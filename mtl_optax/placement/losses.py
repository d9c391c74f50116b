"""Methods on the losses: one backward pass of the weighted sum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def weigh_losses(
    losses: jax.Array, state: Any, method: optax.GradientTransformation, **extra_args: Any
) -> tuple[jax.Array, Any]:
    """Weighs the losses by a method that looks at nothing but losses.

    Returns `sum_t weights[t] * losses[t]`, whose gradient is the weighted sum of the task gradients
    from a single backward pass. The weights are constants to the differentiation. Heads are weighted
    with the rest of the network, because it is the loss that is.

    Args:
      losses: `[T]`, the raw losses inside the differentiated function.
      state: the method's optax state, from `method.init(params)`.
      method: a method with `needs` of nothing but losses, or a chain that ends in one.
      **extra_args: passed to `method.update`: `active=`, `noise=`, ...

    Returns:
      `(weighted_sum, new_state)`: a scalar to differentiate, and the state for the next step (return it
      as auxiliary output). The loss of a task with weight 0 does not reach the sum, not even as NaN; but
      where its derivative is NaN, 0 times it is NaN too. `skip_nonfinite` around the optimizer, or a
      method on gradients, keeps that from the parameters.

    Raises:
      ValueError: where the method needs gradients; the message says where to put it.

    Example:

      >>> import jax, jax.numpy as jnp, mtl_optax as mtl
      >>> method = mtl.scale_invariant(2)
      >>> def loss_fn(w, state):
      ...     losses = jnp.stack([w ** 2, 10 * w])
      ...     return mtl.weigh_losses(losses, state, method)
      >>> w = jnp.asarray(2.0)
      >>> grad, state = jax.grad(loss_fn, has_aux=True)(w, method.init(w))
      >>> round(float(grad), 3)
      1.5

    References:
      The weighted sum of Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses, 2018.
    """
    if jnp.ndim(losses) != 1:
        raise ValueError(f"weigh_losses: losses must be one array [T]; found {jnp.shape(losses)}.")
    constant = jax.lax.stop_gradient(losses)
    # One unit "gradient" a task: what the method makes of them is the vector of its weights.
    units = jnp.eye(losses.shape[0], dtype=losses.dtype)
    update = optax.with_extra_args_support(method).update
    # In place of parameters stands a vector [T], of which the rows of `units` are the "gradients".
    weights, state = update(units, state, constant, losses=constant, on_losses=True, **extra_args)
    weights = jax.lax.stop_gradient(jnp.asarray(weights))
    used = weights != 0
    return jnp.sum(jnp.where(used, weights * jnp.where(used, losses, 0), 0)), state
