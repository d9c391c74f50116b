"""IMTL-G: the same progress along every unit gradient."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import optax

from mtl_optax.arguments import check_num_tasks
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.equal_projection import equal_projection_weights


def imtl_g(
    num_tasks: int, **options: Unpack[WeightingOptions]
) -> optax.GradientTransformationExtraArgs:
    r"""Finds the weights of sum 1 whose update has the same projection on every unit gradient.

    No task is favoured by the length of its gradient, as in a plain sum, nor by its shortness, as in
    MGDA. With :math:`n_t = |g_t|` and the cosine matrix C:

    .. math:: update \cdot g_t / n_t \text{ equal for all } t, \qquad
        a_t = \frac{(C^+ 1)_t / n_t}{\sum_s (C^+ 1)_s / n_s}, \qquad update = \sum_t a_t g_t.

    Mean-like. The closed form of section 3.1 of the paper. Nothing keeps the weights positive, and nothing
    the common projection: for some gradients the update raises every loss. That is the method; `config`
    and `upgrad` do not do so.

    Degenerate input: a zero gradient has weight 0. A singular C (more tasks than dimensions, identical
    gradients) is inverted on its range. Where no answer exists (opposite gradients of equal length, all
    zero) the weights are equal. T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Cost: one pass over the gradients for the
      Gram matrix, one for the sum, and a `[T, T]` eigenvalue problem.

    Raises:
      TypeError: where `num_tasks` is not a static integer.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.imtl_g(2)
      >>> grads = jnp.array([[3., 0.], [0., 1.]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [0.75 0.75]

    References:
      Liu et al., Towards Impartial Multi-task Learning, 2021.
    """
    num_tasks = check_num_tasks("imtl_g", num_tasks)

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        weights = equal_projection_weights(evidence.cosine, evidence.norms, evidence.active)
        return weights, state

    rule = Rule("imtl_g", num_tasks, frozenset({"gram"}), lambda dtype: (), weigh)
    return from_rule(rule, **options)


METHOD = Method(
    name="imtl_g",
    factory=imtl_g,
    needs=("gram",),
    family="from_gram",
    scale="mean",
    reference="Liu et al., Towards Impartial Multi-task Learning, 2021",
    make=imtl_g,
    properties=frozenset({"permutation", "scale", "split"}),
)
