"""Methods on the losses: one backward pass of the weighted sum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.lift import weigh_by_losses
from mtl_optax.core.method import GradientsState, Method, states_in
from mtl_optax.placement.loss_vector import loss_vector

_LOOKS_AT_GRADIENTS = (
    "it cannot weigh losses alone. Use it with mtl_optax.fork_value_and_grad (one backward pass) or "
    "mtl_optax.per_task_value_and_grad."
)


def weigh_losses(
    losses: Any,
    state: Any,
    method: optax.GradientTransformation,
    *,
    active: Any = None,
    **extra_args: Any,
) -> tuple[jax.Array, Any]:
    """Weighs the losses by a method that looks at nothing but losses.

    Returns `sum_t weights[t] * losses[t]`, whose gradient is the weighted sum of the task gradients from
    a single backward pass. The weights are constants to the differentiation. The heads are weighted
    like the rest of the network, because it is the loss that is weighted.

    Notes:
      The loss of a task with weight 0 does not reach the sum, not even as NaN; but where its derivative
      is NaN, 0 times it is NaN in the gradient of all tasks: one backward pass of one sum cannot leave a
      task out. Guard the division in the loss of an absent task, or put a method on the gradients;
      `skip_nonfinite` around the optimizer leaves out the whole step.

      The cost is O(T) for a `Method`. A transformation that only contains one (a chain,
      `optax.inject_hyperparams`) is called on a `[T, T]` identity matrix instead.

    Args:
      losses: a dictionary or tuple of scalars, or an array `[T]`; the raw losses inside the differentiated
        function.
      state: the method's optax state, from `method.init(params)`.
      method: a `Method` with `needs` of nothing but losses, or a chain that holds one.
      active: bool `[T]` or a dictionary, the tasks present in this batch; all by default.
      **extra_args: passed to `method.update`: `noise=`, `losses_after=`, ...

    Returns:
      `(weighted_sum, new_state)`: a scalar to differentiate, and the state for the next step (return it
      as auxiliary output).

    Raises:
      ValueError: if the method needs gradients; the message says where to put it.

    Example:

      >>> import jax, jax.numpy as jnp, mtl_optax as mtl
      >>> method = mtl.scale_invariant(2)
      >>> def loss_fn(w, state):
      ...     return mtl.weigh_losses({"a": w ** 2, "b": 10 * w}, state, method)
      >>> w = jnp.asarray(2.0)
      >>> grad, state = jax.grad(loss_fn, has_aux=True)(w, method.init(w))
      >>> round(float(grad), 3)
      1.5

    References:
      The weighted sum of Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses, 2018,
      https://arxiv.org/abs/1705.07115
    """
    vector = loss_vector(losses)
    constant = jax.lax.stop_gradient(losses)
    if isinstance(method, Method):
        if method.needs - {"losses"}:
            needs = ", ".join(sorted(method.needs))
            raise ValueError(
                f"{method.name}: looks at gradients ({needs}), so {_LOOKS_AT_GRADIENTS}"
            )
        weights, state = weigh_by_losses(method, constant, state, active, extra_args)
    else:
        for node in states_in(state):
            if isinstance(node, GradientsState) or not isinstance(node.norms, tuple):
                raise ValueError(
                    f"weigh_losses: a method in this transformation looks at gradients, so "
                    f"{_LOOKS_AT_GRADIENTS}"
                )
        update = optax.with_extra_args_support(method).update
        # One unit "gradient" per task: what the transformation makes of them is its weights. In place
        # of parameters stands a vector [T], of which the rows are the "gradients".
        weights, state = update(
            jnp.eye(vector.shape[0], dtype=vector.dtype),
            state,
            jax.lax.stop_gradient(vector),
            losses=constant,
            active=active,
            **extra_args,
        )
    weights = jax.lax.stop_gradient(jnp.asarray(weights))
    used = weights != 0
    return jnp.sum(jnp.where(used, weights * jnp.where(used, vector, 0), 0)), state
