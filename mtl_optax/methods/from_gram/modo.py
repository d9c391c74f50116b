"""MoDo: the weights follow the min-norm problem by one projected step per batch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.methods.from_gram.cross_gram import given_gram
from mtl_optax.solvers.simplex import keep_shares, project_onto_simplex, renormalize


class MoDoState(NamedTuple):
    """lambda, `[T]`; starts uniform."""

    simplex_weights: jax.Array


def modo(
    num_tasks: int,
    *,
    gamma: Any = 0.1,
    rho: Any = 0.1,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Moves simplex weights one step towards the min-norm point, from two independent samples.

    MGDA on a stochastic gradient is biased: the square of a noisy gradient is not an estimate of the
    square of its mean. The product of two independent samples is, and a slowly moving weight vector
    averages it. With :math:`G_1, G_2` the task gradients of two batches:

    .. math:: \lambda \leftarrow \Pi_\Delta\big(\lambda - \gamma (G_1 G_2^\top \lambda
        + \rho \lambda)\big), \qquad update = \sum_t \lambda_t g_t,

    with the new :math:`\lambda`: mean-like. Algorithm 1 of the paper. Without ``gram=`` both samples are
    the gradients at hand. With it, ``gram[s, t]`` is the inner product of task s's gradient on the
    first batch and task t's on the second,
    ``jax.vmap(lambda a: jax.vmap(lambda b: optax.tree.vdot(a, b))(second))(first)``; the update weighs
    the gradients given to `update`: a third batch's, or ``first + second`` as in the authors' code (a sum,
    so that the learning rate takes up the 2).

    Degenerate input: a zero gradient attracts weight only through the others' decline. All zero: 0.
    T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      gamma: step size of the weights; it has the unit of an inverse squared gradient norm.
      rho: pull towards uniform weights, not negative.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`; its `update` takes `gram=`, `[T, T]`.
      State: `MoDoState`; an absent task keeps its weight for its return. Cost: one pass over the
      gradients for the Gram matrix, one for the sum; independent samples take more backward passes.

    Raises:
      ValueError: for a `gram` of the wrong shape, or numbers outside their range.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.modo(2, gamma=0.1, rho=0.0)
      >>> _, state = tx.update(jnp.array([[2., 0.], [0., 1.]]), tx.init(jnp.zeros(2)))
      >>> print(np.asarray(state.weights).round(3))
      [0.425 0.575]

    References:
      Chen et al., Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
      Conflict-Avoidance, 2023.
    """
    num_tasks = check_num_tasks("modo", num_tasks)
    check_range("modo", gamma=(gamma, 0, math.inf), rho=(rho, 0, math.inf))

    def init(dtype: Any) -> MoDoState:
        return MoDoState(jnp.full((num_tasks,), 1 / num_tasks, dtype))

    def weigh(evidence: Evidence, state: MoDoState) -> tuple[jax.Array, MoDoState]:
        dtype, active = evidence.norms.dtype, evidence.active
        old = renormalize(state.simplex_weights, active)
        gram = given_gram("modo", num_tasks, evidence)
        if gram is None:
            # A step that would overflow reaches a vertex of the simplex long before.
            limit = jnp.sqrt(jnp.asarray(jnp.finfo(dtype).max / (4 * num_tasks), dtype))
            gram = evidence._replace(norms=jnp.minimum(evidence.norms, limit)).gram
        direction = jnp.sum(gram * old[None, :], axis=1) + jnp.asarray(rho, dtype) * old
        new = project_onto_simplex(old - jnp.asarray(gamma, dtype) * direction, active)
        return new, MoDoState(keep_shares(new, state.simplex_weights, active))

    rule = Rule("modo", num_tasks, frozenset({"gram"}), init, weigh, ("gram",))
    return from_rule(rule, **options)


METHOD = Method(
    name="modo",
    factory=modo,
    needs=("gram",),
    family="from_gram",
    scale="mean",
    reference="Chen et al., Three-Way Trade-Off in Multi-Objective Learning, 2023",
    make=modo,
    properties=frozenset({"permutation", "simplex", "split"}),
)
