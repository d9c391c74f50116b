"""CR-MOGM: smoothed weights for any weighting method."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule, rule_of
from mtl_optax.method import Method
from mtl_optax.methods.from_gram.mgda import mgda


class CRMOGMState(NamedTuple):
    """What CR-MOGM remembers.

    Attributes:
      smoothed: `[T]`, moving average of the weights.
      seen: bool `[T]`, whether a task has been present yet.
      weigher: the state of the weighting method underneath.
    """

    smoothed: jax.Array
    seen: jax.Array
    weigher: Any


def cr_mogm(
    num_tasks: int,
    *,
    weigher: optax.GradientTransformation | None = None,
    alpha: Any = 0.9,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the weights of another method over time.

    On stochastic gradients MGDA's and similar weights jump from batch to batch and depend on the very
    gradients that they multiply, which can keep training from converging. A moving average of the weights
    decouples the two. With :math:`\hat\lambda` the weights of ``weigher`` on this batch:

    .. math:: \lambda \leftarrow \alpha \lambda + (1 - \alpha) \hat\lambda, \qquad
        update = \sum_t \lambda_t g_t,

    starting with the first :math:`\hat\lambda`. Its scale is that of ``weigher``: mean-like with the
    default. Algorithm 1 of the paper with a constant :math:`\alpha`.

    Degenerate input: as ``weigher``. A task that appears for the first time starts with its weight then;
    an absent one keeps its average. T = 1: as ``weigher``.

    Args:
      num_tasks: T, static.
      weigher: any weighting method of this library; None is exact `mgda`.
      alpha: share of the past, in [0, 1]; 0 is the weigher itself.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. State: `CRMOGMState`. Needs and costs what
      the weigher does.

    Raises:
      ValueError: for an alpha outside its range, or a weigher for another number of tasks. TypeError: for
        a `weigher` that is no weighting method.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.cr_mogm(2, alpha=0.5)
      >>> grads = jnp.array([[2., 0.], [0., 1.]])
      >>> _, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> _, state = tx.update(grads[::-1], state)
      >>> print(np.asarray(state.weights).round(3))
      [0.5 0.5]

    References:
      Zhou et al., On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond,
      2022.
    """
    num_tasks = check_num_tasks("cr_mogm", num_tasks)
    check_range("cr_mogm", alpha=(alpha, 0, 1))
    inner = rule_of("cr_mogm", mgda(num_tasks) if weigher is None else weigher)
    if inner.num_tasks != num_tasks:
        raise ValueError(
            f"cr_mogm: the weigher has num_tasks={inner.num_tasks}, expected {num_tasks}."
        )

    def init(dtype: Any) -> CRMOGMState:
        return CRMOGMState(
            jnp.zeros((num_tasks,), dtype), jnp.zeros((num_tasks,), bool), inner.init(dtype)
        )

    def weigh(evidence: Evidence, state: CRMOGMState) -> tuple[jax.Array, CRMOGMState]:
        active, dtype = evidence.active, state.smoothed.dtype
        fresh, weigher_state = inner.weigh(evidence, state.weigher)
        fresh, share = fresh.astype(dtype), jnp.asarray(alpha, dtype)
        moved = jnp.where(state.seen, share * state.smoothed + (1 - share) * fresh, fresh)
        smoothed = jnp.where(active, moved, state.smoothed)
        return smoothed, CRMOGMState(smoothed, state.seen | active, weigher_state)

    rule = Rule("cr_mogm", num_tasks, inner.needs, init, weigh, inner.extra)
    return from_rule(rule, **options)


METHOD = Method(
    name="cr_mogm",
    factory=cr_mogm,
    needs=("gram",),
    family="from_gram",
    scale="mean",
    reference="Zhou et al., On the Convergence of Stochastic Multi-Objective Gradient Manipulation, 2022",
    make=cr_mogm,
    properties=frozenset({"permutation", "scale", "simplex", "split"}),
)
