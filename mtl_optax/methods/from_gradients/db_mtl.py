"""DB-MTL: gradients of log losses, smoothed, and brought to one norm."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax import task_tree
from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_gradients import TaskGradients, from_gradients
from mtl_optax.method import Method

# Part of the method's definition, in the logarithm and beside the norms.
_EPS = 1e-8


class DBMTLState(NamedTuple):
    """The moving average of each task's gradient, leaves `[T, *shape]`; starts at 0."""

    smoothed: Any


def db_mtl(
    num_tasks: int,
    *,
    beta: Any = 0.9,
    beta_sigma: Any = 0.0,
    log_losses: bool = True,
    norm: Literal["max", "min", "median", "mean"] = "max",
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Balances both losses and gradients: log losses first, then equal gradient norms.

    Losses of different units give gradients of different size. The logarithm takes the unit of each
    loss out; bringing the smoothed gradients to the norm of the largest takes out what is left, without
    making the step of the strongest task any shorter.

    At step k (from 1), for the raw gradient :math:`g_t` of the loss :math:`L_t`, ``beta``
    :math:`\beta` and ``beta_sigma`` :math:`\sigma`:

    .. math::
        h_t = \frac{g_t}{L_t + \epsilon}, \quad
        b_t \leftarrow h_t + \beta k^{-\sigma} (b_t - h_t), \quad
        update = \sum_t \frac{\max_s |b_s|}{|b_t| + \epsilon}\, b_t, \quad \epsilon = 10^{-8}.

    Sum-like: up to T times the largest norm. The paper's algorithm 1. As in the authors' program the
    averages start at 0 without bias correction, so the first update is :math:`1 - \beta` times as
    large as a later one, all sums run over the tasks, and the norms are over all parameters at once.
    ``norm`` other than "max" is the choice that the MultiBalance paper compared. The authors train the
    heads on the plain sum of log losses.

    Degenerate input: a zero average contributes 0, and only "min" then makes the update 0. Below norms of
    about 1e-8, :math:`\epsilon` takes over and gradients stay smaller than the largest. A loss below 0
    has no logarithm and counts as 0. T = 1: the smoothed gradient.

    Args:
      num_tasks: T, static.
      beta: decay of the averages, in [0, 1]; 0 keeps no memory.
      beta_sigma: how fast that decay itself falls with the step.
      log_losses: True divides gradients by their losses, which `update(..., losses=)` then needs;
        False takes them as they are.
      norm: the common norm: "max", "min", "median" (the mean of the middle two), or "mean".
      axis_name: mapped axes over which the elements of the gradients are split (`WeightingOptions`).

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. State: `DBMTLState`; the state's `weights`
      multiply the averages. Cost: one pass for the norms, one for the sum; memory: T gradients.

    Raises:
      ValueError: for an unknown `norm`, beta outside [0, 1], or missing `losses`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.db_mtl(2, beta=0.0)
      >>> grads, losses = jnp.array([[4., 0.], [0., 3.]]), jnp.array([2., 1.])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> np.array(update, float).round(3).tolist()
      [3.0, 3.0]

    References:
      Lin et al., Dual-Balancing for Multi-Task Learning, 2023.
    """
    num_tasks = check_num_tasks("db_mtl", num_tasks)
    check_range("db_mtl", beta=(beta, 0, 1))
    if norm not in _COMMON:
        raise ValueError(f'db_mtl: norm must be "max", "min", "median" or "mean"; found {norm!r}.')

    def init(params: Any, dtype: Any) -> DBMTLState:
        return DBMTLState(task_tree.per_task_zeros(params, num_tasks, dtype))

    def apply(view: TaskGradients, state: DBMTLState) -> tuple[Any, jax.Array, DBMTLState]:
        active, dtype = view.active, view.dtype
        updates = view.updates
        if log_losses:
            updates = _divide(updates, jnp.maximum(view.losses, 0) + _EPS)
        count = (view.step + 1).astype(dtype)
        decay = jnp.asarray(beta, dtype) * count ** -jnp.asarray(beta_sigma, dtype)
        smoothed = task_tree.move_towards(state.smoothed, updates, 1 - decay, active)
        grouping = task_tree.assign_blocks(smoothed, "all")
        norms, _ = task_tree.norms(smoothed, grouping, num_tasks, dtype, active, axis_name)
        weights = _COMMON[norm](norms[0], active) / (norms[0] + _EPS)
        update = task_tree.combine(smoothed, weights[None], active, grouping)
        return update, weights, DBMTLState(smoothed)

    needs = frozenset({"gradients", "losses"} if log_losses else {"gradients"})
    return from_gradients("db_mtl", num_tasks, init, apply, needs=needs, axis_name=axis_name)


def _divide(updates: Any, divisors: jax.Array) -> Any:
    """Every task's gradient over its own number, in the statistics' dtype."""

    def one(leaf: jax.Array) -> jax.Array:
        shaped = task_tree.along_tasks(divisors, leaf.ndim)
        return leaf.astype(divisors.dtype) / shaped

    return jax.tree.map(one, updates)


def _median(norms: jax.Array, active: jax.Array) -> jax.Array:
    ordered = jnp.sort(jnp.where(active, norms, jnp.inf))
    count = jnp.maximum(jnp.sum(active, dtype=jnp.int32), 1)
    middle = ordered[(count - 1) // 2] + ordered[count // 2]
    return jnp.where(jnp.any(active), middle / 2, 0)


# The common norm over the active tasks; norms of the others are 0.
_COMMON = {
    "max": lambda norms, active: jnp.max(norms),
    "min": lambda norms, active: jnp.where(
        jnp.any(active), jnp.min(jnp.where(active, norms, jnp.inf)), 0
    ),
    "median": _median,
    "mean": lambda norms, active: (
        jnp.sum(norms) / jnp.maximum(jnp.sum(active, dtype=jnp.int32), 1).astype(norms.dtype)
    ),
}

METHOD = Method(
    name="db_mtl",
    factory=db_mtl,
    needs=("gradients", "losses"),
    family="from_gradients",
    scale="sum",
    reference="Lin et al., Dual-Balancing for Multi-Task Learning, 2023",
    make=db_mtl,
    properties=frozenset({"permutation", "split"}),
)
