"""MoCo: simplex weights that follow the min-norm point of smoothed gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax import task_tree
from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_gradients import TaskGradients, from_gradients
from mtl_optax.method import Method
from mtl_optax.solvers.simplex import keep_shares, project_onto_simplex


class MoCoState(NamedTuple):
    """What MoCo remembers.

    Attributes:
      smoothed: leaves `[T, *shape]`, y: the moving average of each task's gradient; starts at 0.
      simplex_weights: `[T]`, lambda; starts at 1/T.
    """

    smoothed: Any
    simplex_weights: jax.Array


def moco(
    num_tasks: int,
    *,
    beta: Any = 0.1,
    gamma: Any = 0.1,
    rho: Any = 0.1,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Follows the min-norm combination of moving averages of the task gradients.

    The min-norm weights of one batch's gradients are biased, because the batch's noise enters
    quadratically. MoCo takes the noise out of the gradients first, and lets the weights take one small
    step towards the min-norm point instead of jumping there.

    .. math::
        y_t \leftarrow y_t - \beta (y_t - g_t), \quad
        \lambda \leftarrow \Pi_\Delta\big(\lambda - \gamma (Y Y^\top + \rho I) \lambda\big), \quad
        update = \sum_t \lambda_t y_t,

    with the new :math:`y` and :math:`\lambda`. Mean-like once the averages, which start at 0, have
    grown to the gradients' size (about :math:`1/\beta` steps).

    Algorithm 1 of the paper in the form of its first author's program: projection onto the simplex, no
    normalisation, no projection of :math:`y` on a ball, and the update uses the new values where the
    algorithm as printed uses the old ones. A widely used program replaces the projection by a softmax,
    which forgets the weights of earlier steps and stays close to uniform; that is not done here.

    Degenerate input: zero gradients let their averages decay. All zero from the start: the update is 0.
    T = 1: the moving average of the gradient. An absent task keeps its average and its share of
    :math:`\lambda`; the others divide the rest among them as before.

    Args:
      num_tasks: T, static.
      beta: step of the averages, in [0, 1].
      gamma: step of the weights; its unit is one over a squared gradient norm.
      rho: pull of the weights towards uniform.
      axis_name: mapped axes over which the elements of the gradients are split (`WeightingOptions`).

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. State: `MoCoState`; the state's `weights`
      are lambda, and multiply the averages. Cost: one pass for the Gram matrix, one for the sum; memory:
      T gradients.

    Raises:
      ValueError: for beta outside [0, 1].

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.moco(2, beta=0.5)
      >>> update, state = tx.update(jnp.array([[4., 0.], [0., 2.]]), tx.init(jnp.zeros(2)))
      >>> np.array([state.weights, update], float).round(3).tolist()
      [[0.425, 0.575], [0.85, 0.575]]

    References:
      Fernando et al., Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent
      Stochastic Approach, 2023.
    """
    num_tasks = check_num_tasks("moco", num_tasks)
    check_range("moco", beta=(beta, 0, 1))

    def init(params: Any, dtype: Any) -> MoCoState:
        uniform = jnp.full((num_tasks,), 1 / num_tasks, dtype)
        return MoCoState(task_tree.per_task_zeros(params, num_tasks, dtype), uniform)

    def apply(view: TaskGradients, state: MoCoState) -> tuple[Any, jax.Array, MoCoState]:
        active, dtype = view.active, view.dtype
        smoothed = task_tree.move_towards(
            state.smoothed, view.updates, jnp.asarray(beta, dtype), active
        )
        grouping = task_tree.assign_blocks(smoothed, "all")
        cosine, norms, _ = task_tree.gram(smoothed, grouping, num_tasks, dtype, active, axis_name)
        # The old weights, given that only the active tasks are here.
        old = jnp.where(active, state.simplex_weights, 0)
        mass = jnp.sum(old)
        start = old / jnp.where(mass > 0, mass, 1)
        step = _slope(cosine[0], norms[0], start) + jnp.asarray(rho, dtype) * start
        weights = project_onto_simplex(start - jnp.asarray(gamma, dtype) * step, active)
        kept = keep_shares(weights, state.simplex_weights, active)
        update = task_tree.combine(smoothed, weights[None], active, grouping)
        return update, weights, MoCoState(smoothed, kept)

    return from_gradients("moco", num_tasks, init, apply, axis_name=axis_name)


def _slope(cosine: jax.Array, norms: jax.Array, weights: jax.Array) -> jax.Array:
    """`Y Y' weights`, with squares taken where they cannot overflow."""
    unit = jnp.max(norms)
    lengths = norms / jnp.where(unit > 0, unit, 1)
    along = lengths * jnp.sum(cosine * (lengths * weights)[None, :], axis=1)
    # A step that would overflow reaches a vertex of the simplex long before.
    limit = jnp.sqrt(jnp.asarray(jnp.finfo(norms.dtype).max, norms.dtype)) / 4
    return along * jnp.minimum(unit, limit) ** 2


METHOD = Method(
    name="moco",
    factory=moco,
    needs=("gradients",),
    family="from_gradients",
    scale="mean",
    reference="Fernando et al., Mitigating Gradient Bias in Multi-objective Learning, 2023",
    make=moco,
    properties=frozenset({"permutation", "simplex", "split"}),
)
