"""Gradient similarity: auxiliary gradients weighted by their cosine with the target's."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import factory
from mtl_optax.core.validation import find_target
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule


@factory
def grad_similarity(
    tasks: int | Collection[str],
    *,
    target: int | str | None = None,
    mode: Literal["unweighted", "weighted"] = "unweighted",
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Sums the gradients without the auxiliary ones that conflict with the target's.

    An auxiliary task helps while its gradient agrees with the target's. Otherwise it is excluded from
    this step (with ``blocks="leaf"``, for this tensor).

    .. math:: w_t = [\cos(g_t, g_{target}) \ge 0] \;\text{("unweighted")}, \qquad
        w_t = \max(0, \cos(g_t, g_{target})) \;\text{("weighted")}, \qquad w_{target} = 1, \qquad
        update = \sum_t w_t g_t

    The inner product of the update with the target's gradient is at least :math:`|g_{target}|^2`. Scale:
    sum-like. The unweighted and the weighted variant of the paper.

    Args:
      tasks: T, or the task names.
      target: name or index of the target task: required if the tasks have names, else 0 by default.
      mode: "unweighted" keeps or drops a gradient, "weighted" multiplies it by the cosine.
      **options: see `MethodOptions`.

    Returns:
      A `Method`. Cost: one pass over the gradients for the Gram matrix, one for the sum.

    Raises:
      ValueError: if the target or the mode is unknown.

    Notes:
      The paper has no public code. For a cosine of exactly 0 its unweighted form gives 1/2; here the
      gradient is kept. To combine with MetaBalance:
      ``optax.chain(metabalance(T, reduce=False), grad_similarity(T), optax.adam(1e-3))``.

      The cosine of a zero gradient is 0. If the target is zero or absent, "unweighted" keeps all
      auxiliary gradients and "weighted" none. If all gradients are zero, the update is 0. With one task,
      the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.grad_similarity(3, target=0)
      >>> grads = jnp.array([[1., 0.], [-1., 1.], [1., 1.]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> print(np.asarray(update).round(3))
      [2. 1.]

    References:
      Du, Czarnecki, Jayakumar, Farajtabar, Pascanu and Lakshminarayanan, Adapting Auxiliary Losses Using
      Gradient Similarity, 2018, https://arxiv.org/abs/1812.02224
    """
    index = find_target("grad_similarity", target, tasks)

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        similarity = inputs.cosine[:, index]
        if mode == "unweighted":
            weights = (similarity >= 0).astype(similarity.dtype)
        else:
            weights = jnp.maximum(similarity, 0)
        return weights.at[index].set(1), state

    rule = WeightRule(frozenset({"gram"}), weigh, target=index)
    return from_rule("grad_similarity", tasks, rule, **options)
