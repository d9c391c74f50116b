"""MoDo: one projected step per batch towards the min-norm weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.extra_args import given_gram
from mtl_optax.core.factory import Nonnegative, factory
from mtl_optax.core.types import DType
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.cosine import gram_product, product
from mtl_optax.solvers.simplex import keep_shares, project_onto_simplex, renormalize


class MoDoState(NamedTuple):
    """State of `modo`, `[T]` per block.

    Attributes:
      simplex_weights: lambda; starts uniform.
    """

    simplex_weights: jax.Array


@factory
def modo(
    tasks: int | Collection[str],
    *,
    weight_lr: Nonnegative = 0.1,
    rho: Nonnegative = 0.1,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Moves simplex weights one step towards the min-norm point, from two independent samples.

    The min-norm weights of a stochastic gradient are biased, because its noise enters quadratically. The
    inner product of two independent samples is unbiased, and slowly moving weights average its noise.

    With :math:`G_1, G_2` the task gradients of two batches, ``weight_lr`` :math:`\gamma` and ``rho``
    :math:`\rho`:

    .. math:: \lambda \leftarrow \Pi_\Delta\big(\lambda - \gamma (G_1 G_2^\top \lambda
        + \rho \lambda)\big), \qquad update = \sum_t \lambda_t g_t,

    with the new :math:`\lambda`. Scale: mean-like. Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      weight_lr: step size of the weights, in units of an inverse squared gradient norm; not negative.
      rho: strength of the regularisation towards uniform weights; not negative.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `MoDoState`; its `update` takes `gram=`, `[T, T]` (see Notes). Cost: one
      pass over the gradients for the Gram matrix, one for the sum; independent samples need more backward
      passes.

    Raises:
      ValueError: if a number is outside its range, or `gram` has the wrong shape.

    Notes:
      Without `gram=`, both samples are the gradients given to `update`. With it, ``gram[s, t]`` is the
      inner product of task s's gradient on the first batch and task t's on the second:
      ``jax.vmap(lambda a: jax.vmap(lambda b: optax.tree.vdot(a, b))(second))(first)``. The gradients given
      to `update` are then those of a third batch, or ``first + second`` as in the authors' code (a sum,
      so the learning rate must be half as large).

      The weight of a zero gradient increases only because the others decrease. If all gradients are zero,
      the update is 0. The weight of an absent task does not change. With one task, the update is its
      gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.modo(2, weight_lr=0.1, rho=0.0)
      >>> _, state = tx.update(jnp.array([[2., 0.], [0., 1.]]), tx.init(jnp.zeros(2)))
      >>> print(np.asarray(state.weights).round(3))
      [[0.425 0.575]]

    References:
      Chen, Fernando, Ying and Chen, Three-Way Trade-Off in Multi-Objective Learning: Optimization,
      Generalization and Conflict-Avoidance, 2023, https://arxiv.org/abs/2305.20057
    """

    def init(num_tasks: int, dtype: DType) -> MoDoState:
        return MoDoState(jnp.full((num_tasks,), 1 / num_tasks, dtype))

    def weigh(inputs: StepInputs, state: MoDoState) -> tuple[jax.Array, MoDoState]:
        dtype, active = inputs.norms.dtype, inputs.active
        old = renormalize(state.simplex_weights, active)
        gram = given_gram("modo", inputs)
        if gram is None:
            gradient = gram_product(inputs.cosine, inputs.norms, old)
        else:
            gradient = product(gram, old)
        gradient = gradient + jnp.asarray(rho, dtype) * old
        new = project_onto_simplex(old - jnp.asarray(weight_lr, dtype) * gradient, active)
        return new, MoDoState(keep_shares(new, state.simplex_weights, active))

    rule = WeightRule(frozenset({"gram"}), weigh, init, ("gram",))
    return from_rule("modo", tasks, rule, **options)
