"""MGDA: the convex combination of task gradients with the smallest norm."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.min_norm import min_norm_weights


def mgda(
    num_tasks: int,
    *,
    normalize: Literal["none", "l2", "loss", "loss+"] = "none",
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the convex combination of task gradients with the smallest norm.

    Its negative is a direction along which no loss rises to first order, and it is 0 exactly where no
    such direction exists (a Pareto-stationary point). Small gradients get large weights, so MGDA
    follows the task that has nearly converged; ``normalize`` changes that.

    .. math:: a = \arg\min_{a \ge 0,\ \sum_t a_t = 1} \Big|\sum_t a_t\, g_t / c_t\Big|^2, \qquad
        update = \sum_t a_t g_t,

    with :math:`c_t = 1` ("none"), :math:`|g_t|` ("l2"), the loss :math:`L_t` ("loss"), or
    :math:`L_t |g_t|` ("loss+"). The weights multiply the raw gradients. Mean-like.

    Solved exactly, to the dtype's precision, weights of exactly 0 included; the public programs stop at
    weights of 0.001 or 0.999 and after a fixed number of Frank-Wolfe steps, which with gradient norms a
    thousand times apart changes the update by as much as itself.

    Degenerate input: one zero gradient gets all the weight and the update is 0, with any normalisation;
    all zero: equal weights. With "loss" and "loss+", a loss of 0 (or below) counts as converged in the
    same way. Where 0 lies in the hull of gradients some 100 times (float32) as long as another, that one
    keeps a weight, and the update is as long as it at most. T = 1: weight 1.

    Args:
      num_tasks: T, static.
      normalize: what divides the gradients before the minimisation.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Cost: one pass over the gradients for the
      Gram matrix, one for the sum, and a `[T, T]` quadratic program.

    Raises:
      ValueError: for an unknown `normalize`, or missing `losses` where it needs them.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.mgda(2)
      >>> update, state = tx.update(jnp.array([[2., 0.], [0., 1.]]), tx.init(jnp.zeros(2)))
      >>> print(np.asarray(state.weights).round(3))
      [0.2 0.8]
      >>> print(np.asarray(update).round(3))
      [0.4 0.8]

    References:
      Desideri, Multiple-Gradient Descent Algorithm, 2012; Sener and Koltun, Multi-Task Learning as
      Multi-Objective Optimization, 2018, algorithm 2.
    """
    num_tasks = check_num_tasks("mgda", num_tasks)
    if normalize not in ("none", "l2", "loss", "loss+"):
        raise ValueError(
            f'mgda: normalize must be "none", "l2", "loss" or "loss+"; found {normalize!r}.'
        )

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        norms = evidence.norms
        if normalize in ("loss", "loss+"):
            losses = jnp.maximum(evidence.losses, 0)
            positive = losses > 0
            scaled = norms if normalize == "loss" else jnp.where(norms > 0, 1, 0)
            # A loss of 0 would make its gradient infinite; it is converged, like a zero gradient.
            norms = jnp.where(positive, scaled / jnp.where(positive, losses, 1), 0)
        elif normalize == "l2":
            norms = jnp.where(norms > 0, 1, 0)
        norms = norms.astype(evidence.cosine.dtype)
        return min_norm_weights(evidence.cosine, norms, evidence.active), state

    needs = {"gram", "losses"} if normalize in ("loss", "loss+") else {"gram"}
    rule = Rule("mgda", num_tasks, frozenset(needs), lambda dtype: (), weigh)
    return from_rule(rule, **options)


METHOD = Method(
    name="mgda",
    factory=mgda,
    needs=("gram",),
    family="from_gram",
    scale="mean",
    reference="Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, 2018",
    make=mgda,
    properties=frozenset(
        {"non_conflicting", "permutation", "scale", "simplex", "stationary", "split"}
    ),
)
