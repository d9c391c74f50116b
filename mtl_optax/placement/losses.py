"""Methods on the losses: one backward pass of the weighted sum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.core.method import Method
from mtl_optax.core.state import BalanceState, check_fields
from mtl_optax.core.tasks import task_vector
from mtl_optax.core.types import Active, Losses
from mtl_optax.placement.loss_vector import loss_vector

_LOOKS_AT_GRADIENTS = (
    "it cannot weigh losses alone. Use it with mtl_optax.fork_value_and_grad (one backward pass) or "
    "mtl_optax.per_task_value_and_grad."
)


def weigh_losses(
    losses: Losses,
    state: BalanceState,
    method: Method,
    *,
    active: Active | None = None,
    **extra_args: Any,
) -> tuple[jax.Array, BalanceState]:
    """Weighs the losses by a method that looks at nothing but losses.

    Returns `sum_t weights[t] * losses[t]`, whose gradient is the weighted sum of the task gradients from
    a single backward pass. The weights are constants to the differentiation. The heads are weighted
    like the rest of the network, because it is the loss that is weighted.

    Notes:
      The loss of a task with weight 0 does not reach the sum, not even as NaN; but where its derivative
      is NaN, 0 times it is NaN in the gradient of all tasks: one backward pass of one sum cannot leave a
      task out. Guard the division in the loss of an absent task, or put a method on the gradients;
      `skip_nonfinite` around the optimizer leaves out the whole step.

      The cost is O(T).

    Args:
      losses: a dictionary or tuple of scalars, or an array `[T]`; the raw losses inside the differentiated
        function.
      state: the method's optax state, from `method.init(params)`.
      method: a `Method` with `needs` of nothing but losses.
      active: bool `[T]` or a dictionary, the tasks present in this batch; all by default.
      **extra_args: passed to `method.update`: `noise=`, `losses_after=`, ...

    Returns:
      `(weighted_sum, new_state)`: a scalar to differentiate, and the state for the next step (return it
      as auxiliary output).

    Raises:
      TypeError: for a transformation that is no `Method`. ValueError: if the method needs gradients; the
        message says where to put it.

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
    if not isinstance(method, Method):
        raise TypeError(
            "weigh_losses: method must be what a factory of mtl_optax returned, found a "
            f"{type(method).__name__}. Put what else a chain holds into the optimizer."
        )
    if method.needs - {"losses"}:
        needs = ", ".join(sorted(method.needs))
        raise ValueError(f"{method.name}: looks at gradients ({needs}), so {_LOOKS_AT_GRADIENTS}")
    weights, state = _weights(method, jax.lax.stop_gradient(losses), state, active, extra_args)
    used = weights != 0
    return jnp.sum(jnp.where(used, weights * jnp.where(used, vector, 0), 0)), state


def _weights(
    method: Method,
    losses: Losses,
    state: BalanceState,
    active: Active | None,
    extra_args: dict[str, Any],
) -> tuple[jax.Array, BalanceState]:
    """The weights `[T]` of a method that looks at losses alone, and its new state."""
    road = method.definition
    given = road.read(state, losses, active, extra_args=extra_args)
    inputs = road.inputs(given, state)
    # Losses are needed for their finiteness, also by methods that do not look at them.
    vector = task_vector(method.name, "losses", losses, method.tasks, state.weights.dtype)
    inputs = inputs.restrict(jnp.isfinite(vector))
    check_fields(method.name, method.rule, state, ())
    if method.options.update_every == 1:
        state = road.weigh(state, inputs)
    else:
        due = road.due(state, inputs.active)
        state = lax.cond(due, lambda state: road.weigh(state, inputs), lambda state: state, state)
    # Every block saw the same losses.
    weights = jnp.where(inputs.active, jnp.mean(state.weights, axis=0), 0)
    return jax.lax.stop_gradient(weights), road.finish(state, given, inputs.active)
