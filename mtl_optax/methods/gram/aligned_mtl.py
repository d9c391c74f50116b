"""Aligned-MTL: the nearest orthogonal gradients of equal length."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Unpack

import jax
import optax

from mtl_optax.core.factory import factory
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.aligned import aligned_weights


@factory
def aligned_mtl(
    tasks: int | Collection[str],
    *,
    scale: Literal["min", "median", "rmse"] = "min",
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Sums the orthogonal gradients of equal length that are nearest to the task gradients.

    Conflict and dominance increase the condition number of the matrix of gradients. It is 1 for
    orthogonal gradients of equal length.

    With the gradients as rows of G, :math:`G = U S V^\top` its singular value decomposition (U and S from
    the Gram matrix), and the common length :math:`\sigma`:

    .. math:: \hat G = \sigma\, U V^\top, \qquad w = \sigma\, U S^{-1} U^\top 1, \qquad
        update = \sum_t w_t g_t = \hat G^\top 1

    Scale: sum-like. Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      scale: sigma: "min", the smallest nonzero singular value (the paper); "median", the lower median of
        the nonzero ones; "rmse", their root mean square.
      **options: see `MethodOptions`.

    Returns:
      A `Method`. Cost: one pass over the gradients for the Gram matrix, one for the sum, and a `[T, T]`
      eigenvalue problem.

    Raises:
      ValueError: if `scale` is unknown.

    Notes:
      The preference is a vector of ones, as in the authors' code; other libraries use 1/T.

      Singular values below about 3e-3 (float32) or 6e-8 (float64) of the largest count as zero: they are
      within the rounding error of the Gram matrix. A gradient that is shorter by this factor has weight
      0, and with "min" the length of the update is discontinuous there. If norms differ so much, rescale
      the gradients first: ``chain(metabalance(T, reduce=False), aligned_mtl(T))``.

      A zero gradient has weight 0. If all gradients are zero, the update is 0. For identical gradients it
      is their sum, and for opposite gradients of equal length it is 0. With one task, the update is its
      gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.aligned_mtl(2)
      >>> grads = jnp.array([[4., 0.], [0., 1.]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> print(np.asarray(update).round(3))
      [1. 1.]

    References:
      Senushkin, Patakin, Kuznetsov and Konushin, Independent Component Alignment for Multi-Task
      Learning, 2023, https://arxiv.org/abs/2305.19000
    """

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        return aligned_weights(inputs.geometry, scale), state

    return from_rule("aligned_mtl", tasks, WeightRule(frozenset({"gram"}), weigh), **options)
