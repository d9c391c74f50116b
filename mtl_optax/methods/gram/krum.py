"""Krum: the mean of the gradients closest to their neighbours."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import Flag, factory
from mtl_optax.core.validation import check_integer, read_tasks
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import count_active, safe_divide


@factory
def krum(
    tasks: int | Collection[str],
    *,
    num_byzantine: int = 0,
    num_selected: int = 1,
    squared: Flag = False,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Averages the task gradients closest to their neighbours and discards the others.

    It is made for federated learning, in which some workers may send arbitrary gradients.

    With f = ``num_byzantine`` and m = ``num_selected``, the score of a task is the sum of the distances
    to its T - f - 2 nearest neighbours :math:`N_t`:

    .. math:: s_t = \sum_{j \in N_t} |g_t - g_j|, \qquad
        update = \frac1m \sum_{t \in S} g_t, \quad S \text{ the } m \text{ tasks of lowest score.}

    Scale: mean-like. Section 4 of the paper; m > 1 is Multi-Krum.

    Args:
      tasks: T, or the task names.
      num_byzantine: f, an integer from 0 to T - 3 (only 0 for T < 3).
      num_selected: m, an integer from 1 to T.
      squared: True sums squared distances, as in the paper; False sums distances, as in TorchJD.
      **options: see `MethodOptions`.

    Returns:
      A `Method` whose rule has no state. Cost: one pass over the gradients for the Gram matrix, one for
      the sum, and a sort of `[T, T]` distances.

    Raises:
      ValueError: if an integer is outside its range.

    Notes:
      Equal scores share the remaining weight, so the order of the tasks does not matter. Two tasks always
      have equal scores. At least one neighbour counts, even if fewer than f + 3 tasks are present.

      For identical gradients, the update is this gradient. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.krum(4, num_byzantine=1)
      >>> grads = jnp.array([[1., 0.], [1., 1.], [1., 1.5], [90., 0.]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [1.   1.25]

    References:
      Blanchard, El Mhamdi, Guerraoui and Stainer, Machine Learning with Adversaries: Byzantine Tolerant
      Gradient Descent, 2017,
      https://papers.nips.cc/paper/2017/hash/f4b9ec30ad9f68f89b29639786cb62ef-Abstract.html
    """
    axis = read_tasks("krum", tasks)
    check_integer("krum", "num_byzantine", num_byzantine, 0, max(0, axis.number - 3))
    check_integer("krum", "num_selected", num_selected, 1, axis.number)

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        active = inputs.active
        count = jnp.sum(active, dtype=jnp.int32)
        distances = _distances(inputs.cosine, inputs.norms, squared)
        others = active[:, None] & active[None, :] & ~jnp.eye(axis.number, dtype=bool)
        nearest_first = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
        neighbours = jnp.minimum(jnp.maximum(count - num_byzantine - 2, 1), count - 1)
        counted = jnp.arange(axis.number, dtype=jnp.int32)[None, :] < neighbours
        scores = jnp.sum(jnp.where(counted, nearest_first, 0), axis=1)
        scores = jnp.where(active, scores, jnp.inf)
        return _mean_of_lowest(scores, active, num_selected), state

    return from_rule("krum", axis, WeightRule(frozenset({"gram"}), weigh), **options)


def _distances(cosine: jax.Array, norms: jax.Array, squared: bool) -> jax.Array:
    """Computes distances between the gradients in units of the largest norm, `[T, T]`.

    The sum of a difference of norms and a term for the angle is accurate; `|a|^2 + |b|^2 - 2 a.b` is not.
    """
    # Exactly symmetric, so that equal scores are equal bit for bit.
    cosine = (cosine + cosine.T) / 2
    lengths = safe_divide(norms, jnp.max(norms))
    difference = lengths[:, None] - lengths[None, :]
    angle = 2 * lengths[:, None] * lengths[None, :] * (1 - cosine)
    squares = difference * difference + jnp.maximum(angle, 0)
    if squared:
        return squares
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _mean_of_lowest(scores: jax.Array, active: jax.Array, number: int) -> jax.Array:
    """Returns equal weights for the `number` lowest scores; ties share the remaining weight."""
    dtype = scores.dtype
    count = jnp.minimum(jnp.sum(active, dtype=jnp.int32), number)
    last = jnp.sort(scores)[jnp.maximum(count - 1, 0)]
    below, tied = active & (scores < last), active & (scores == last)
    left = count - jnp.sum(below, dtype=jnp.int32)
    share = left.astype(dtype) / count_active(tied, dtype)
    chosen = below.astype(dtype) + jnp.where(tied, share, 0)
    return chosen / jnp.maximum(count, 1).astype(dtype)
