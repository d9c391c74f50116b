"""Methods on the losses: one backward pass through their weighted sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.core.method import Method
from mtl_optax.core.state import BalanceState, check_fields
from mtl_optax.core.task_tree import Measured
from mtl_optax.core.types import Active, Losses
from mtl_optax.core.validation import task_vector
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
    **extra_args: object,
) -> tuple[jax.Array, BalanceState]:
    """Weighs the losses by a method that needs only the losses.

    Returns `sum_t weights[t] * losses[t]`. One backward pass through this sum gives the weighted sum of
    the task gradients. The weights are constant under differentiation. Because the losses are weighted,
    the gradients of the heads are weighted too.

    Notes:
      A loss with weight 0 does not enter the sum, even if it is NaN. If its derivative is NaN, however,
      the whole gradient is NaN, because one backward pass cannot exclude a task and 0 times NaN is NaN.
      Guard divisions in the loss of an absent task, or use a method on the gradients. `skip_nonfinite`
      around the optimizer skips the whole step.

      The cost is O(T).

    Args:
      losses: the raw losses inside the differentiated function: a dictionary or tuple of scalars, or an
        array `[T]`.
      state: the state of the method, from `method.init(params)`.
      method: a `Method` whose `needs` contains at most "losses".
      active: which tasks are in this batch, bool `[T]` or a dictionary by task name; all by default.
      **extra_args: the extra arguments of the method: `noise=`, `losses_after=`, ...

    Returns:
      `(weighted_sum, new_state)`: a scalar to differentiate, and the state for the next step, which the
      differentiated function returns as auxiliary output.

    Raises:
      TypeError: if `method` is not a `Method`.
      ValueError: if the method needs gradients.

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
    extra_args: dict[str, object],
) -> tuple[jax.Array, BalanceState]:
    """Returns the weights `[T]` of a method that needs only the losses, and its new state."""
    pipeline = method.definition
    inputs = pipeline.read(state, losses, active, extra_args=extra_args)
    # A task with a non-finite loss is inactive, even if the method does not read the losses.
    vector = task_vector(method.name, "losses", losses, method.tasks, state.weights.dtype)
    inputs = inputs.restrict(jnp.isfinite(vector))
    check_fields(method.name, method.rule, state, ())
    measured = Measured(inputs.active)
    if method.options.always_due:
        state = pipeline.weigh(state, inputs, measured)
    else:
        due = pipeline.due(state, inputs.active)
        state = lax.cond(
            due, lambda state: pipeline.weigh(state, inputs, measured), lambda state: state, state
        )
    # The weights are equal in all blocks, up to rounding, because the losses are.
    weights = jnp.where(inputs.active, jnp.mean(state.weights, axis=0), 0)
    return jax.lax.stop_gradient(weights), pipeline.finish(state, inputs, inputs.active)
