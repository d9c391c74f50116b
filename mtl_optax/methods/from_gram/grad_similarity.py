"""Gradient similarity: auxiliary tasks count only while they point the target's way."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks, check_task_index
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method


def grad_similarity(
    num_tasks: int,
    *,
    target: int = 0,
    mode: Literal["unweighted", "weighted"] = "unweighted",
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Drops auxiliary gradients that conflict with the target's, then sums.

    An auxiliary task helps only as long as its gradient agrees with the target's; where it does not, it
    is left out of this step (or tensor, with ``blocks="leaf"``).

    .. math:: w_t = [\cos(g_t, g_{target}) \ge 0] \;\text{("unweighted")}, \qquad
        w_t = \max(0, \cos(g_t, g_{target})) \;\text{("weighted")}, \qquad w_{target} = 1,

    and the update is :math:`\sum_t w_t g_t`: sum-like. Its inner product with the target's gradient is
    never below :math:`|g_{target}|^2`. The paper has no public code; at a cosine of exactly 0 its sign
    form would give 1/2, here the gradient is kept. With MetaBalance in one line:
    ``optax.chain(metabalance(T, reduce=False), grad_similarity(T), optax.adam(1e-3))``.

    Degenerate input: the cosine of a zero gradient is 0. A zero or absent target therefore keeps all
    auxiliaries in the "unweighted" mode and none in the "weighted" one. T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      target: index of the target task.
      mode: "unweighted" keeps or drops, "weighted" multiplies by the cosine.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Cost: one pass over the gradients for the
      Gram matrix, one for the sum.

    Raises:
      ValueError: for a target outside 0..T-1 or an unknown mode.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.grad_similarity(3, target=0)
      >>> grads = jnp.array([[1., 0.], [-1., 1.], [1., 1.]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [2. 1.]

    References:
      Du et al., Adapting Auxiliary Losses Using Gradient Similarity, 2018.
    """
    num_tasks = check_num_tasks("grad_similarity", num_tasks)
    target = check_task_index("grad_similarity", "target", target, num_tasks)
    if mode not in ("unweighted", "weighted"):
        raise ValueError(
            f'grad_similarity: mode must be "unweighted" or "weighted"; found {mode!r}.'
        )

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        similarity = evidence.cosine[:, target]
        if mode == "unweighted":
            weights = (similarity >= 0).astype(similarity.dtype)
        else:
            weights = jnp.maximum(similarity, 0)
        return weights.at[target].set(1), state

    rule = Rule("grad_similarity", num_tasks, frozenset({"gram"}), lambda dtype: (), weigh)
    return from_rule(rule, **options)


METHOD = Method(
    name="grad_similarity",
    factory=grad_similarity,
    needs=("gram",),
    family="from_gram",
    scale="sum",
    reference="Du et al., Adapting Auxiliary Losses Using Gradient Similarity, 2018",
    make=grad_similarity,
    properties=frozenset({"scale", "split"}),
)
