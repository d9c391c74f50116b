"""IMTL-L: every loss scaled to the same size by a learned factor."""

from __future__ import annotations

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.log_weights import largest_weight
from mtl_optax.trained_values import TrainedState, start, train


def imtl_l(
    num_tasks: int,
    *,
    optimizer: optax.GradientTransformation = optax.adam(1e-3),
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Learns one scale per task that brings every loss to 1.

    Losses of different sizes are scaled by :math:`e^{s_t}`, with :math:`s_t` trained to minimise
    :math:`e^{s_t} L_t - s_t`, whose minimum is where the scaled loss is 1. The weights
    :math:`w_t = e^{s_t}` are used first and trained after; the scale is the method's own. Without a
    prior on the tasks, so "impartial". The loss half of algorithm 1 of the paper; `imtl` joins it with
    the gradient half, `imtl_g`. Authors' code is not public.

    Degenerate input: a loss of 0 lets its scale grow without bound in the definition; here weights stay
    between the inverse of 1.8e19 and 1.8e19 (float32). The same for negative losses. T = 1: one scale.

    Args:
      num_tasks: T, static.
      optimizer: trains the logarithms of the scales, from 0; any optax optimizer.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Needs `losses=`. State:
      `rule_state.values`, `[T]`. Cost: O(T).

    Raises:
      ValueError: for missing `losses`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, optax, mtl_optax as mtl
      >>> tx = mtl.imtl_l(2, optimizer=optax.sgd(0.1))
      >>> grads, losses = jnp.eye(2), jnp.array([4., 0.5])
      >>> updates, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(updates, np.asarray(state.rule_state.values).round(3))
      [1. 1.] [-0.3   0.05]

    References:
      Liu et al., Towards Impartial Multi-Task Learning, 2021.
    """
    num_tasks = check_num_tasks("imtl_l", num_tasks)

    def first(dtype: Any) -> TrainedState:
        return start(optimizer, jnp.zeros((num_tasks,), dtype))

    def weigh(evidence: Evidence, state: TrainedState) -> tuple[jax.Array, TrainedState]:
        weights = jnp.exp(state.values)
        high = math.log(largest_weight(weights.dtype))
        gradient = weights * evidence.losses - 1
        return weights, train(optimizer, state, gradient, evidence.active, -high, high)

    return from_rule(Rule("imtl_l", num_tasks, frozenset({"losses"}), first, weigh), **options)


METHOD = Method(
    name="imtl_l",
    factory=imtl_l,
    needs=("losses",),
    family="from_losses",
    scale="own",
    reference="Liu et al., Towards Impartial Multi-Task Learning, 2021",
    make=imtl_l,
    properties=frozenset({"permutation", "scale", "split"}),
)
