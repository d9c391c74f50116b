"""GradCraft: equal magnitudes, then one projection of each gradient off all that conflict with it."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.factory import Decay, Nonnegative, Share, factory
from mtl_optax.core.types import DType
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import count_active, move_average, safe_divide
from mtl_optax.solvers.spectral import pseudo_solve


class GradCraftState(NamedTuple):
    """State of `gradcraft`, `[T]` per block.

    Attributes:
      norm_ema: EMA of each task's gradient norm, which starts at 0.
      correction: the bias correction of each EMA: `1 - ema_decay ** k` after k steps.
    """

    norm_ema: jax.Array
    correction: jax.Array


@factory
def gradcraft(
    tasks: int | Collection[str],
    *,
    relax_factor: Share = 1.0,
    margin: Nonnegative = 0.0,
    ema_decay: Decay = 0.0,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Rescales gradients towards the largest magnitude, and removes all conflicts of each one at once.

    Magnitudes are balanced first, so that no gradient dominates the projections. Then each gradient is
    projected on the normal space of all gradients that conflict with it. `pcgrad` projects on one after
    the other, and a later projection can restore a conflict that an earlier one has removed.

    With :math:`m_t` the EMA of the norm of task t's gradient with decay ``ema_decay`` :math:`\beta`,
    ``relax_factor`` r and ``margin`` :math:`\epsilon`:

    .. math::
        g_t' = r\, \frac{\max_s m_s}{m_t}\, g_t + (1 - r)\, g_t, \qquad
        d_t = g_t' + C_t^\top (C_t C_t^\top)^{-1} (\epsilon\, |g_t'| c_t - C_t g_t'), \qquad
        update = \frac1T \sum_t d_t,

    where the rows of :math:`C_t` are the gradients :math:`g_s'` with :math:`g_s' \cdot g_t' < 0`, and
    :math:`c_t` are their norms: :math:`d_t` is the nearest vector to :math:`g_t'` with
    :math:`g_s' \cdot d_t = \epsilon |g_s'| |g_t'|` for all of them. Scale: mean-like, relative to the
    largest gradient. This is the magnitude balance and the global direction balance of the paper.

    Args:
      tasks: T, or the task names.
      relax_factor: r in [0, 1]; 1 makes all magnitudes equal, 0 leaves them as they are.
      margin: epsilon, the inner product after the projection relative to the norms; the authors' program
        tries 1e-10 to 1e-8.
      ema_decay: beta in [0, 1).
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `GradCraftState`. Cost: one pass over the gradients for the Gram matrix,
      one for the sum, and T eigenvalue problems of size `[T, T]`.

    Raises:
      ValueError: if a number is outside its range.

    Notes:
      The authors' experiments have ``ema_decay=0``, and the defaults are those of their program. The
      weights are computed from the cosine matrix; no projected gradient is stored. If the conflicting
      gradients are linearly dependent, the pseudo-inverse replaces the inverse, which does not exist; with
      a ``margin`` the projection is then a least-squares solution. The averages are corrected for the
      steps at which each task was present; if all always are, the correction cancels.

      A gradient that becomes :math:`d_t` can conflict with one that it did not conflict with before. A
      zero gradient conflicts with none. For two opposite gradients of equal magnitude the update is 0.
      With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.gradcraft(2)
      >>> grads = jnp.array([[5., 0.], [-0.6, 0.8]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [1.6 3.2]

    References:
      Bai, Zhang, Feng, Lu, Zang, Lei and Song, GradCraft: Elevating Multi-task Recommendations through
      Holistic Gradient Crafting, 2024, https://arxiv.org/abs/2407.19682
    """

    def init(num_tasks: int, dtype: DType) -> GradCraftState:
        return GradCraftState(jnp.zeros((num_tasks,), dtype), jnp.zeros((num_tasks,), dtype))

    def weigh(inputs: StepInputs, state: GradCraftState) -> tuple[jax.Array, GradCraftState]:
        norms, active, dtype = inputs.norms, inputs.active, inputs.norms.dtype
        ema = move_average(state.norm_ema, norms, ema_decay, active)
        correction = move_average(state.correction, 1, ema_decay, active)
        mean = safe_divide(ema, correction)
        relax = jnp.asarray(relax_factor, dtype)
        largest = jnp.max(mean, where=active, initial=0)
        # A norm divided by its average is bounded; the quotient of two averages is not.
        balanced = relax * largest * safe_divide(norms, mean) + (1 - relax) * norms
        added = _projections(inputs.cosine, jnp.asarray(margin, dtype)) * balanced[:, None]
        weights = safe_divide(balanced + jnp.sum(added, axis=0), norms)
        return weights / count_active(active, dtype), GradCraftState(ema, correction)

    return from_rule("gradcraft", tasks, WeightRule(frozenset({"gram"}), weigh, init), **options)


def _projections(cosine: jax.Array, margin: jax.Array) -> jax.Array:
    """Returns coefficients `[T, T]`: row t says how much of each unit gradient is added to that of t."""

    def project(row: jax.Array) -> jax.Array:
        conflicts = row < 0
        both = conflicts[:, None] & conflicts[None, :]
        added = pseudo_solve(jnp.where(both, cosine, 0), jnp.where(conflicts, margin - row, 0))
        return jnp.where(conflicts, added, 0)

    return jax.vmap(project)(cosine)
