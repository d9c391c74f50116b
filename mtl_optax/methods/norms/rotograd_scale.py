"""The scaling of RotoGrad: rescales all gradients to one norm, which depends on the slowest tasks."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.factory import NonnegativeInt, factory
from mtl_optax.core.types import DType
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import safe_divide


class RotoGradState(NamedTuple):
    """State of `rotograd_scale`, `[T]` per block.

    Attributes:
      initial_norms: the reference norm of each task, which is 0 until its first nonzero gradient.
    """

    initial_norms: jax.Array


@factory
def rotograd_scale(
    tasks: int | Collection[str], *, burn_in: NonnegativeInt = 20, **options: Unpack[MethodOptions]
) -> Method:
    r"""Gives all task gradients the same norm, which depends mostly on the slowest tasks.

    A task with a much larger gradient dominates the shared parameters. The common norm is a mean of the
    norms, in which norms that have decreased least have the largest weights, so that steps stay long
    while a task has not converged.

    .. math::
        \alpha_t = \frac{n_t / n_t^0}{\sum_s n_s / n_s^0}, \qquad C = \sum_t \alpha_t n_t, \qquad
        w_t = C / n_t, \qquad update = \sum_t w_t g_t

    with :math:`n_t` the norm of task t's gradient and :math:`n_t^0` its norm at the start. Scale:
    sum-like. Section 4.1 of the paper.

    Args:
      tasks: T, or the task names.
      burn_in: the update, counted from 0, at which the reference norms are measured again; 0 keeps the
        first norms.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `RotoGradState`. Cost: one pass over the gradients for the norms, one for
      the sum.

    Raises:
      ValueError: if `burn_in` is negative.

    Notes:
      The method is made for the representation (`mtl_optax.fork`). The second part of the paper, a
      trained rotation of the representation per task, has model parameters and a separate optimizer. It
      is not a transformation of gradients, and not part of this function.

      As in the authors' code, the reference norms are measured again once, because those of the first
      batches are not typical. In this code the ratio of a gradient that starts at 0 is always huge; here
      the first norm above 0 is the reference.

      A zero gradient has :math:`\alpha = 0` and contributes 0. If all gradients are zero, the update is
      0. The reference norm of an absent task does not change. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.rotograd_scale(2)
      >>> update, _ = tx.update(jnp.array([[3., 0.], [0., 1.]]), tx.init(jnp.zeros(2)))
      >>> np.array(update, float).round(3).tolist()
      [2.0, 2.0]

    References:
      Javaloy and Valera, RotoGrad: Gradient Homogenization in Multitask Learning, 2022,
      https://arxiv.org/abs/2103.02631
    """

    def init(num_tasks: int, dtype: DType) -> RotoGradState:
        return RotoGradState(jnp.zeros((num_tasks,), dtype))

    def weigh(inputs: StepInputs, state: RotoGradState) -> tuple[jax.Array, RotoGradState]:
        norms = inputs.norms
        positive = norms > 0
        renew = (state.initial_norms == 0) | (inputs.step == burn_in)
        initial = jnp.where(inputs.active & positive & renew, norms, state.initial_norms)
        ratios = safe_divide(norms, initial, where=positive)
        shares = safe_divide(ratios, jnp.sum(ratios))
        common = jnp.sum(shares * norms)
        return safe_divide(common, norms), RotoGradState(initial)

    rule = WeightRule(frozenset({"norms"}), weigh, init)
    return from_rule("rotograd_scale", tasks, rule, **options)
