"""GradNorm: trains weights so that gradient norms depend on the training rates."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import Nonnegative, Transformation, factory
from mtl_optax.core.state import next_count
from mtl_optax.core.trained_values import TrainedState, start, train
from mtl_optax.core.types import DType
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import mean_active, safe_divide
from mtl_optax.solvers.log_weights import largest_weight, loss_ratio


class GradNormState(NamedTuple):
    """State of `gradnorm`, `[T]` per block.

    Attributes:
      trained_weights: the weights and the state of their optimizer.
      first_losses: the loss of each task when it was first present.
      started: bool, whether each task has been present.
      fallback_count: int32 scalar, the number of updates without a positive new weight.
    """

    trained_weights: TrainedState
    first_losses: jax.Array
    started: jax.Array
    fallback_count: jax.Array


@factory
def gradnorm(
    tasks: int | Collection[str],
    *,
    alpha: Nonnegative = 1.5,
    optimizer: Transformation = optax.adam(0.025),
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Trains weights so that tasks with slow progress get larger gradients.

    Tasks with large gradients dominate the shared parameters, independently of their progress. With
    :math:`n_t` the norm of task t's raw gradient, ``alpha`` :math:`\alpha`, and :math:`r_t` the loss
    relative to its first value, divided by the mean of this over the tasks, ``optimizer`` minimises

    .. math::
        \sum_t \big| w_t n_t - \bar G\, r_t^\alpha \big|, \qquad
        \bar G = \tfrac1T \sum_t w_t n_t \text{ (constant)}, \qquad
        \partial_{w_t} = \mathrm{sign}(w_t n_t - \bar G r_t^\alpha)\, n_t ,

    and the weights are rescaled to sum to T. They start at 1, and the update uses the weights before the
    step. Scale: sum-like. Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      alpha: >= 0; larger values enforce equal training rates more strongly.
      optimizer: any optax optimizer, which trains the weights.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `GradNormState`. `update` needs `losses=`. Cost: one pass over the
      gradients for the norms, one for the sum.

    Raises:
      ValueError: if `alpha` is negative.

    Notes:
      The paper takes the norms on the last shared layer only, as `weighted_value_and_grad` does with
      `weights_from`. On the representation (`fork_value_and_grad`) the method needs one backward pass.

      In the paper weights can become negative; here they are at least 0. If no weight stays positive, the
      weights do not change and `fallback_count` increases. Published programs differ: one trains the
      logits of a softmax with the network's optimizer, one uses a new optimizer at every step (so that
      only signs matter), and one has the opposite sign of the exponent.

      For a zero gradient the derivative of its weight is 0. A first loss of 0 has the relative loss 1; a
      loss with the opposite sign of the first has the relative loss 0. The weight of an absent task does
      not change. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, optax, mtl_optax as mtl
      >>> tx = mtl.gradnorm(2, optimizer=optax.sgd(0.1))
      >>> grads, losses = jnp.array([[3., 0.], [0., 1.]]), jnp.array([1., 1.])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(update, np.asarray(state.rule_state.trained_weights.values).round(3))
      [3. 1.] [[0.778 1.222]]

    References:
      Chen, Badrinarayanan, Lee and Rabinovich, GradNorm: Gradient Normalization for Adaptive Loss
      Balancing in Deep Multitask Networks, 2018, https://arxiv.org/abs/1711.02257
    """

    def init(num_tasks: int, dtype: DType) -> GradNormState:
        return GradNormState(
            trained_weights=start(optimizer, jnp.ones((num_tasks,), dtype)),
            first_losses=jnp.zeros((num_tasks,), dtype),
            started=jnp.zeros((num_tasks,), bool),
            fallback_count=jnp.zeros((), jnp.int32),
        )

    def weigh(inputs: StepInputs, state: GradNormState) -> tuple[jax.Array, GradNormState]:
        active, weights = inputs.active, state.trained_weights.values
        first = jnp.where(state.started | ~active, state.first_losses, inputs.losses)
        gradient = weight_gradient(inputs, weights, first)
        largest = largest_weight(weights.dtype)
        trained = train(optimizer, state.trained_weights, gradient, active, 0.0, largest)
        # The sum of the active weights does not change, because absent tasks keep their weights.
        total = jnp.sum(trained.values, where=active)
        old_total = jnp.sum(weights, where=active)
        fails = jnp.any(active) & ~(total > 0)
        rescaled = trained.values * safe_divide(old_total, total)
        return weights, GradNormState(
            trained_weights=trained._replace(values=jnp.where(active & ~fails, rescaled, weights)),
            first_losses=first,
            started=state.started | active,
            fallback_count=next_count(state.fallback_count, fails),
        )

    def weight_gradient(inputs: StepInputs, weights: jax.Array, first: jax.Array) -> jax.Array:
        active, dtype = inputs.active, weights.dtype
        relative = jnp.maximum(loss_ratio(inputs.losses, first), 0)
        rate = safe_divide(relative, mean_active(relative, active), 1)
        norms = weights * inputs.norms
        target = mean_active(norms, active) * rate ** jnp.asarray(alpha, dtype)
        return jnp.sign(norms - target) * inputs.norms

    rule = WeightRule(frozenset({"losses", "norms"}), weigh, init)
    return from_rule("gradnorm", tasks, rule, **options)
