"""MoCo: min-norm weights of averaged gradients, by one small step per update."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import task_tree
from mtl_optax.core.factory import AnyNumber, Decay, factory
from mtl_optax.core.types import DType
from mtl_optax.rule import GradientAverage, Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.cosine import gram_product
from mtl_optax.solvers.simplex import keep_shares, project_onto_simplex, renormalize


class MoCoState(NamedTuple):
    """State of `moco`, `[T]` per block. The averages y are in `state.averages`.

    Attributes:
      simplex_weights: lambda, which starts at 1/T.
    """

    simplex_weights: jax.Array


@factory
def moco(
    tasks: int | Collection[str],
    *,
    ema_decay: Decay = 0.9,
    weight_lr: AnyNumber = 0.1,
    rho: AnyNumber = 0.1,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Combines moving averages of the task gradients by slowly changing min-norm weights.

    The min-norm weights of one batch are biased, because the noise of the batch enters quadratically.
    MoCo averages the gradients over the steps first, and moves the weights by one small step per update
    towards the min-norm point of the averages.

    With ``ema_decay`` :math:`1 - \beta`, ``weight_lr`` :math:`\gamma`, ``rho`` :math:`\rho`, and the
    averages :math:`y_t` as the rows of Y:

    .. math::
        y_t \leftarrow y_t - \beta (y_t - g_t), \qquad
        \lambda \leftarrow \Pi_\Delta\big(\lambda - \gamma (Y Y^\top + \rho I) \lambda\big), \qquad
        update = \sum_t \lambda_t y_t

    Scale: mean-like, after about :math:`1/\beta` steps; the averages start at 0. Algorithm 1 of the
    paper.

    Args:
      tasks: T, or the task names.
      ema_decay: the share of the averages that is kept, in [0, 1); the paper's beta is 1 minus this.
      weight_lr: step size of the weights, in units of an inverse squared gradient norm.
      rho: regularisation of the weights towards uniform.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `MoCoState`. `state.averages` are y, which `state.weights` (lambda)
      multiply. Cost: one pass over the gradients for the averages, one for the Gram matrix, one for the
      sum; memory: T gradients.

    Raises:
      ValueError: if `ema_decay` is outside [0, 1).

    Notes:
      Use it on parameters. On a representation `[batch, width]` (`fork`) the averages would mix unrelated
      examples of successive batches, unless its rows always have the same meaning.

      As in the first author's code, the weights are projected onto the simplex, gradients are not
      normalised, :math:`y` is not projected onto a ball, and the update uses the new :math:`y` and
      :math:`\lambda` (the algorithm in the paper uses the old ones). A widely used library replaces the
      projection by a softmax, which ignores the weights of earlier steps and stays close to uniform; this
      method does not.

      A zero gradient decays its average. If all gradients have been zero, the update is 0. The average
      and the share of :math:`\lambda` of an absent task do not change; the other tasks divide the rest in
      the same proportions. With one task, the update is its averaged gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.moco(2, ema_decay=0.5)
      >>> update, state = tx.update(jnp.array([[4., 0.], [0., 2.]]), tx.init(jnp.zeros(2)))
      >>> np.array([state.weights[0], update], float).round(3).tolist()
      [[0.425, 0.575], [0.85, 0.575]]

    References:
      Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, Mitigating Gradient Bias in Multi-objective
      Learning: A Provably Convergent Stochastic Approach, 2023, https://arxiv.org/abs/2210.12624
    """

    def init(num_tasks: int, dtype: DType) -> MoCoState:
        return MoCoState(jnp.full((num_tasks,), 1 / num_tasks, dtype))

    def average(
        inputs: StepInputs, averages: optax.OptState
    ) -> tuple[optax.Updates, optax.OptState]:
        averages = task_tree.move_averages(averages, inputs.updates, ema_decay, inputs.active)
        return averages, averages

    def weigh(inputs: StepInputs, state: MoCoState) -> tuple[jax.Array, MoCoState]:
        active, dtype = inputs.active, inputs.norms.dtype
        old = renormalize(state.simplex_weights, active)
        gradient = gram_product(inputs.cosine, inputs.norms, old)
        gradient = gradient + jnp.asarray(rho, dtype) * old
        weights = project_onto_simplex(old - jnp.asarray(weight_lr, dtype) * gradient, active)
        return weights, MoCoState(keep_shares(weights, state.simplex_weights, active))

    moving_average = GradientAverage(task_tree.per_task_zeros, average)
    rule = WeightRule(frozenset({"gram"}), weigh, init, average=moving_average)
    return from_rule("moco", tasks, rule, **options)
