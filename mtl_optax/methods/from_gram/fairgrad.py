"""FairGrad: alpha-fair division of progress between tasks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule, next_count
from mtl_optax.method import Method
from mtl_optax.solvers.nash import fair_weights


class BargainingState(NamedTuple):
    """How often no bargaining solution existed and the min-norm weights stood in; int32."""

    fallback_count: jax.Array


def bargaining_rule(name: str, num_tasks: int, alpha: Any) -> Rule:
    """The rule of `fairgrad`, and with ``alpha=1`` that of `nash_mtl`."""

    def init(dtype: Any) -> BargainingState:
        return BargainingState(jnp.zeros((), jnp.int32))

    def weigh(evidence: Evidence, state: BargainingState) -> tuple[jax.Array, BargainingState]:
        fairness = jnp.asarray(alpha, evidence.norms.dtype)
        weights, solved = fair_weights(evidence.cosine, evidence.norms, evidence.active, fairness)
        failed = jnp.any(evidence.active) & ~solved
        return weights, BargainingState(next_count(state.fallback_count, failed))

    return Rule(name, num_tasks, frozenset({"gram"}), init, weigh)


def fairgrad(
    num_tasks: int, *, alpha: Any = 1.0, **options: Unpack[WeightingOptions]
) -> optax.GradientTransformationExtraArgs:
    r"""Divides progress between tasks alpha-fairly, as networks divide bandwidth.

    Each task's utility is its progress :math:`g_t \cdot d`. Maximising the sum of alpha-fair utilities
    over directions of bounded length gives positive weights with

    .. math:: G G^\top w = w^{-1/\alpha} \;\text{(elementwise)}, \qquad update = \sum_t w_t g_t.

    ``alpha`` = 1 is proportional fairness, Nash-MTL; towards 0 the mean of the losses counts; large
    values approach max-min fairness. The length is the method's own: with :math:`\alpha = 1` always
    :math:`\sqrt T`. Algorithm 1 of the paper.

    The root is found by Newton's method on the cosine matrix, to the dtype's precision; the authors' least
    squares from a fixed start is wrong by large factors where norms differ much or lie around 1e-3. They
    also multiply by T and clip to norm 1: chain ``optax.clip_by_global_norm(1.0)`` for that. Their
    experiments use alpha = 2.

    Degenerate input: no root exists where a gradient is zero or 0 lies in the convex hull of the
    gradients (opposite gradients, more tasks than dimensions); then the weights are those of MGDA, whose
    update vanishes there, and ``rule_state.fallback_count`` counts. All zero: 0, counted.
    T = 1: :math:`w = |g|^{-2\alpha/(1+\alpha)}`.

    Args:
      num_tasks: T, static.
      alpha: fairness, positive.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. State: `BargainingState`. Cost: one pass
      over the gradients for the Gram matrix, one for the sum, and about ten `[T, T]` factorisations.

    Raises:
      ValueError: for an alpha that is not positive.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.fairgrad(2, alpha=2.0)
      >>> _, state = tx.update(jnp.array([[8., 0.], [0., 1.]]), tx.init(jnp.zeros(2)))
      >>> print(np.asarray(state.weights).round(4))
      [0.0625 1.    ]

    References:
      Ban and Ji, Fair Resource Allocation in Multi-Task Learning, 2024.
    """
    num_tasks = check_num_tasks("fairgrad", num_tasks)
    check_range("fairgrad", alpha=(alpha, 0, math.inf))
    if isinstance(alpha, (int, float)) and alpha == 0:
        raise ValueError("fairgrad: alpha must be positive; for the mean use mean_tasks.")
    return from_rule(bargaining_rule("fairgrad", num_tasks, alpha), **options)


METHOD = Method(
    name="fairgrad",
    factory=fairgrad,
    needs=("gram",),
    family="from_gram",
    scale="own",
    reference="Ban and Ji, Fair Resource Allocation in Multi-Task Learning, 2024",
    make=fairgrad,
    properties=frozenset({"non_conflicting", "permutation", "stationary", "split", "task_scale"}),
)
