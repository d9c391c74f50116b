"""PCGrad: removes from each gradient the components that conflict with the other tasks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.extra_args import projection_order
from mtl_optax.core.factory import Seed, factory
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.projections import add_in_order, projected_sum_weights


@factory
def pcgrad(
    tasks: int | Collection[str],
    *,
    order: Literal["random", "cyclic"] = "random",
    seed: Seed = 0,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Projects each task gradient on the normal planes of conflicting gradients, and sums the results.

    Two gradients conflict if their inner product is negative: a step for one task increases the loss of
    the other. For each task i, starting at :math:`g_i' = g_i`, for every other j in its order:

    .. math:: g_i' \leftarrow g_i' - \frac{\min(g_i' \cdot g_j,\, 0)}{|g_j|^2}\, g_j, \qquad
        update = \sum_i g_i'.

    Scale: sum-like. Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      order: "random" shuffles the other tasks for each task at every step; "cyclic" is i+1, i+2, ...
      seed: the seed of the shuffle, which depends only on it and on the number of the step.
      **options: see `MethodOptions`.

    Returns:
      A `Method` whose rule has no state; its `update` takes `order=`, integers `[T, T]` to use instead of
      `order` (row i for task i, whose own number is skipped). Cost: one pass over the gradients for the
      Gram matrix, one for the sum, and T passes over a `[T, T]` array.

    Raises:
      ValueError: if `order` is unknown, or the `order` of `update` is not integers `[T, T]`.

    Notes:
      The weights of the raw gradients are computed from the Gram matrix; no projected gradient is stored.
      With `reduce=False` the entries are :math:`w_t g_t`, whose sum is the update, not the projected
      gradients.

      There are three differences from public code. The index j = i is skipped; the authors' code and
      others project on it, which has an effect only for more tasks than dimensions. Every row is
      shuffled; in the authors' code the order is always 0 to T - 1. Nothing is added to :math:`|g_j|^2`.

      For two tasks the update is twice that of `upgrad`; for more, conflicts can remain. A zero gradient
      conflicts with none. For two opposite gradients the update is 0. With one task, the update is its
      gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.pcgrad(2)
      >>> grads = jnp.array([[1., 0.], [-1., 1.]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [0.5 1.5]

    References:
      Yu, Kumar, Gupta, Levine, Hausman and Finn, Gradient Surgery for Multi-Task Learning, 2020,
      https://arxiv.org/abs/2001.06782
    """

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        orders = projection_order("pcgrad", order, seed, inputs)

        def remove_conflict(
            component: jax.Array, others: jax.Array, memory: tuple[()]
        ) -> tuple[jax.Array, tuple[()]]:
            return jnp.maximum(-component, 0), memory

        added, _ = add_in_order(inputs.cosine, orders, remove_conflict, ())
        return projected_sum_weights(added, inputs.norms), state

    rule = WeightRule(frozenset({"gram"}), weigh, extra=("order",))
    return from_rule("pcgrad", tasks, rule, **options)
