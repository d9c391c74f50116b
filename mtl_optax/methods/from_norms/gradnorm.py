"""GradNorm: weighted gradient norms that follow the tasks' training rates."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule, next_count
from mtl_optax.method import Method
from mtl_optax.solvers.log_weights import largest_weight
from mtl_optax.trained_values import TrainedState, start, train


class GradNormState(NamedTuple):
    """What GradNorm remembers.

    Attributes:
      trained_weights: the weights `[T]` and their optimizer's state.
      first_losses: `[T]`, each task's loss when it was first present.
      seen: bool `[T]`, whether it was.
      fallback_count: int32, updates after which no weight was positive, so that the old ones were kept.
    """

    trained_weights: TrainedState
    first_losses: jax.Array
    seen: jax.Array
    fallback_count: jax.Array


def gradnorm(
    num_tasks: int,
    *,
    alpha: Any = 1.5,
    optimizer: optax.GradientTransformation = optax.adam(0.025),
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Trains weights so that tasks that lag behind get larger gradients.

    With :math:`n_t` the norm of task t's raw gradient and :math:`r_t` its inverse training rate, the
    loss relative to the first one, over the mean of these over tasks, the weights descend

    .. math::
        \sum_t \big| w_t n_t - \bar G\, r_t^\alpha \big|, \qquad
        \bar G = \tfrac1T \sum_t w_t n_t \text{ (constant)}, \qquad
        \partial_{w_t} = \mathrm{sign}(w_t n_t - \bar G r_t^\alpha)\, n_t ,

    and are renormalised to sum to T: sum-like. They start at 1, are used first and trained after.
    Algorithm 1 of the paper. Programs in circulation differ: a softmax parametrisation trained by the
    network's optimizer, an optimizer made anew at every step (only signs then matter), the exponent's
    sign. The paper takes norms on the last shared layer: put the method there (`mtl_optax.fork`, or
    `optax.partition`) to save cost. Nothing in the paper keeps weights from turning negative; here they
    stop at 0.

    Degenerate input: a zero gradient does not move its weight. A first loss of 0 has the relative loss 1,
    and a loss of the other sign than the first counts as 0. If no weight stays positive, the old ones are
    kept, and this is counted. T = 1: 1. An absent task keeps its weight.

    Args:
      num_tasks: T, static.
      alpha: strength of the pull towards equal rates, >= 0.
      optimizer: trains the weights; any optax optimizer.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Needs `losses=`. State: `GradNormState`.
      Cost: one pass over the gradients for the norms, one for the sum.

    Raises:
      ValueError: for a negative `alpha` or missing `losses`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, optax, mtl_optax as mtl
      >>> tx = mtl.gradnorm(2, optimizer=optax.sgd(0.1))
      >>> grads, losses = jnp.array([[3., 0.], [0., 1.]]), jnp.array([1., 1.])
      >>> updates, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(updates, np.asarray(state.rule_state.trained_weights.values).round(3))
      [3. 1.] [0.778 1.222]

    References:
      Chen, Badrinarayanan, Lee and Rabinovich, GradNorm: Gradient Normalization for Adaptive Loss
      Balancing in Deep Multitask Networks, 2018.
    """
    num_tasks = check_num_tasks("gradnorm", num_tasks)
    check_range("gradnorm", alpha=(alpha, 0, math.inf))

    def init(dtype: Any) -> GradNormState:
        return GradNormState(
            trained_weights=start(optimizer, jnp.ones((num_tasks,), dtype)),
            first_losses=jnp.zeros((num_tasks,), dtype),
            seen=jnp.zeros((num_tasks,), bool),
            fallback_count=jnp.zeros((), jnp.int32),
        )

    def weigh(evidence: Evidence, state: GradNormState) -> tuple[jax.Array, GradNormState]:
        active, weights = evidence.active, state.trained_weights.values
        first = jnp.where(state.seen | ~active, state.first_losses, evidence.losses)
        trained = train(
            optimizer,
            state.trained_weights,
            _gradient(evidence, weights, first),
            active,
            0.0,
            largest_weight(weights.dtype),
        )
        # The active weights share what the absent ones leave of T.
        total = jnp.sum(jnp.where(active, trained.values, 0))
        room = jnp.sum(jnp.where(active, weights, 0))
        fails = jnp.any(active) & ~(total > 0)
        factor = room / jnp.where(total > 0, total, 1)
        values = jnp.where(active & ~fails, trained.values * factor, weights)
        return weights, GradNormState(
            trained_weights=trained._replace(values=values),
            first_losses=first,
            seen=state.seen | active,
            fallback_count=next_count(state.fallback_count, fails),
        )

    def _gradient(evidence: Evidence, weights: jax.Array, first: jax.Array) -> jax.Array:
        active, dtype = evidence.active, weights.dtype
        count = jnp.maximum(jnp.sum(active), 1).astype(dtype)
        known = first != 0
        relative = jnp.where(known, evidence.losses / jnp.where(known, first, 1), 1)
        relative = jnp.where(active, jnp.clip(relative, 0, largest_weight(dtype)), 0)
        mean = jnp.sum(relative) / count
        rate = jnp.where(mean > 0, relative / jnp.where(mean > 0, mean, 1), 1)
        sizes = jnp.where(active, weights * evidence.norms, 0)
        target = jnp.sum(sizes / count) * rate ** jnp.asarray(alpha, dtype)
        return jnp.sign(sizes - target) * evidence.norms

    return from_rule(
        Rule("gradnorm", num_tasks, frozenset({"losses", "norms"}), init, weigh), **options
    )


METHOD = Method(
    name="gradnorm",
    factory=gradnorm,
    needs=("losses", "norms"),
    family="from_norms",
    scale="sum",
    reference="Chen et al., GradNorm, 2018",
    make=gradnorm,
    properties=frozenset({"permutation", "split"}),
)
