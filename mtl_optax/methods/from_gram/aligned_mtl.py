"""Aligned-MTL: gradients made orthogonal and of one length by the smallest change."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import jax
import optax

from mtl_optax.arguments import check_num_tasks
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.aligned import SCALES, aligned_weights


def aligned_mtl(
    num_tasks: int,
    *,
    scale: Literal["min", "median", "rmse"] = "min",
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradients by the nearest orthogonal system of equal lengths, then sums.

    Conflict and dominance show in the condition number of the gradient system: orthogonal gradients of
    equal length have 1. With the singular value decomposition :math:`G = U S V^\top`, U and S taken from
    the Gram matrix, and the common length :math:`\sigma`:

    .. math:: \hat G = \sigma\, U V^\top, \qquad w = \sigma\, U S^{-1} U^\top 1, \qquad
        update = \sum_t w_t g_t = \hat G^\top 1.

    ``scale`` says what :math:`\sigma` is: the smallest singular value that is not zero (the paper),
    their lower median, or their root mean square. Sum-like (the preference is a vector of ones, as in the
    authors' code; other libraries use 1/T). Algorithm 1 of the paper.

    Singular values below about 3e-3 of the largest one in float32 (6e-8 in float64) count as zero, since
    a Gram matrix holds no information about them: a task whose gradient is that much shorter drops out.
    With "min" the length of the update jumps where that happens. Rescale first
    (``chain(metabalance(T, reduce=False), aligned_mtl(T))``) where norms differ that much.

    Degenerate input: a zero gradient has weight 0. All zero: 0. Identical gradients: their sum. Opposite
    gradients of equal length: 0. T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      scale: the common length (above).
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Cost: one pass over the gradients for the
      Gram matrix, one for the sum, and a `[T, T]` eigenvalue problem.

    Raises:
      ValueError: for an unknown `scale`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.aligned_mtl(2)
      >>> grads = jnp.array([[4., 0.], [0., 1.]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [1. 1.]

    References:
      Senushkin et al., Independent Component Alignment for Multi-Task Learning, 2023.
    """
    num_tasks = check_num_tasks("aligned_mtl", num_tasks)
    if scale not in SCALES:
        raise ValueError(f'aligned_mtl: scale must be "min", "median" or "rmse"; found {scale!r}.')

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        weights = aligned_weights(evidence.cosine, evidence.norms, evidence.active, scale)
        return weights, state

    rule = Rule("aligned_mtl", num_tasks, frozenset({"gram"}), lambda dtype: (), weigh)
    return from_rule(rule, **options)


METHOD = Method(
    name="aligned_mtl",
    factory=aligned_mtl,
    needs=("gram",),
    family="from_gram",
    scale="sum",
    reference="Senushkin et al., Independent Component Alignment, 2023",
    make=aligned_mtl,
    properties=frozenset({"permutation", "scale", "split"}),
)
