"""PCGrad: every gradient loses what conflicts with the other tasks, one after the other."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.arguments import check_num_tasks
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.methods.from_gram.projection_order import (
    check_order,
    projection_order,
    raw_weights,
)


def pcgrad(
    num_tasks: int,
    *,
    order: Literal["random", "cyclic"] = "random",
    seed: int = 0,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Projects each task's gradient off those it conflicts with, then sums.

    Two gradients conflict where their inner product is negative: one task's step undoes part of the
    other's. Each gradient meets the other tasks' original gradients in turn and loses its component
    along every one it conflicts with at that moment.

    For each task i, starting at :math:`g_i' = g_i`, for every other j in its order:

    .. math:: g_i' \leftarrow g_i' - \frac{\min(g_i' \cdot g_j,\, 0)}{|g_j|^2}\, g_j, \qquad
        update = \sum_i g_i'.

    Sum-like. Algorithm 1 of the paper. The weights on the raw gradients come from the Gram matrix alone:
    no projected gradient is ever stored. Differences from public code: a gradient is never projected on
    its own original (the authors' code and others do that too, which matters only for more tasks than
    dimensions); rows are truly shuffled (the authors' shuffle has no effect: always 0..T-1); nothing is
    added to :math:`|g_j|^2`.

    For two tasks the update is twice that of `upgrad`. For more, conflicts can remain.

    Degenerate input: a zero gradient conflicts with none. All zero: 0. Two opposite gradients: 0. T = 1:
    the gradient itself. With ``reduce=False`` the slots hold :math:`w_t g_t`, whose sum is the update;
    they are not the projected gradients themselves.

    Args:
      num_tasks: T, static.
      order: "random" shuffles the others for each task at every step; "cyclic" goes i+1, i+2, ...
      seed: of the shuffling, which depends on it and on the number of the step only.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`; its `update` takes `order=`, integers
      `[T, T]` that override the drawn order (row i for task i; its own number is skipped). Cost: one
      pass over the gradients for the Gram matrix, one for the sum, and T passes over a `[T, T]` array.

    Raises:
      ValueError: for an unknown `order`, or one given to `update` that is not `[T, T]` integers.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.pcgrad(2)
      >>> grads = jnp.array([[1., 0.], [-1., 1.]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [0.5 1.5]

    References:
      Yu et al., Gradient Surgery for Multi-Task Learning, 2020.
    """
    num_tasks = check_num_tasks("pcgrad", num_tasks)
    check_order("pcgrad", order)
    tasks = jnp.arange(num_tasks, dtype=jnp.int32)

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        cosine, norms = evidence.cosine, evidence.norms

        def meet(
            carry: tuple[jax.Array, jax.Array], others: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            # Row i, in units of n_i: added[i] are its coefficients, along[i] its components along all.
            added, along = carry
            one_hot = (others[:, None] == tasks[None, :]).astype(cosine.dtype)
            component = jnp.sum(along * one_hot, axis=1)
            conflict = (component < 0) & (others != tasks)
            taken = jnp.where(conflict, -component, 0)[:, None]
            return (added + taken * one_hot, along + taken * cosine[others]), None

        orders = projection_order("pcgrad", num_tasks, order, seed, evidence)
        start = (jnp.zeros_like(cosine), cosine)
        (added, _), _ = lax.scan(meet, start, orders.T)
        return raw_weights(added, norms), state

    rule = Rule("pcgrad", num_tasks, frozenset({"gram"}), lambda dtype: (), weigh, ("order",))
    return from_rule(rule, **options)


METHOD = Method(
    name="pcgrad",
    factory=pcgrad,
    needs=("gram",),
    family="from_gram",
    scale="sum",
    reference="Yu et al., Gradient Surgery for Multi-Task Learning, 2020",
    make=pcgrad,
    properties=frozenset({"scale", "split"}),
    random=True,
)
