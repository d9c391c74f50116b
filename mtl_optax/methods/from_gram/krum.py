"""Krum: the gradients that lie closest to their neighbours."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_integer, check_num_tasks
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method


def krum(
    num_tasks: int,
    *,
    num_byzantine: int = 0,
    num_selected: int = 1,
    squared: bool = False,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the gradients that are closest to their neighbours and drops the rest.

    From federated learning, where some workers send anything: a gradient far from most others is not
    trusted. With f = ``num_byzantine`` and m = ``num_selected``, the score of a task is the sum of its
    distances to its T - f - 2 nearest neighbours,

    .. math:: s_t = \sum_{j \in N_t} |g_t - g_j|, \qquad
        update = \frac1m \sum_{t \in S} g_t, \quad S \text{ the } m \text{ tasks of lowest score.}

    Mean-like. m > 1 is Multi-Krum. Section 4 of the paper, which sums squared distances
    (``squared=True``); the default follows the library whose keywords these are. Tasks that tie for the
    last place share it, so that the order of the tasks does not matter.

    Degenerate input: at least one neighbour counts, also where absent tasks leave fewer than f + 3. Two
    tasks always tie. Identical tasks: one of them. All zero: 0. T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      num_byzantine: f, at most T - 3 (or 0).
      num_selected: m, 1 to T.
      squared: whether distances are squared before the sum.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Cost: one pass over the gradients for the
      Gram matrix, one for the sum, and a sort of `[T, T]` distances.

    Raises:
      ValueError: for numbers outside their range.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.krum(4, num_byzantine=1)
      >>> grads = jnp.array([[1., 0.], [1., 1.], [1., 1.5], [90., 0.]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [1.   1.25]

    References:
      Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, 2017.
    """
    num_tasks = check_num_tasks("krum", num_tasks)
    check_integer("krum", "num_byzantine", num_byzantine, 0, max(0, num_tasks - 3))
    check_integer("krum", "num_selected", num_selected, 1, num_tasks)

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        active = evidence.active
        count = jnp.sum(active, dtype=jnp.int32)
        distances = _distances(evidence.cosine, evidence.norms, squared)
        others = active[:, None] & active[None, :] & ~jnp.eye(num_tasks, dtype=bool)
        nearest_first = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
        neighbours = jnp.minimum(jnp.maximum(count - num_byzantine - 2, 1), count - 1)
        counted = jnp.arange(num_tasks, dtype=jnp.int32)[None, :] < neighbours
        scores = jnp.sum(jnp.where(counted, nearest_first, 0), axis=1)
        return _lowest(jnp.where(active, scores, jnp.inf), active, num_selected), state

    rule = Rule("krum", num_tasks, frozenset({"gram"}), lambda dtype: (), weigh)
    return from_rule(rule, **options)


def _distances(cosine: jax.Array, norms: jax.Array, squared: bool) -> jax.Array:
    """Distances between gradients in units of the largest norm, without cancellation in the norms."""
    cosine = (cosine + cosine.T) / 2  # symmetric to the last bit, so that ties are ties
    largest = jnp.max(norms)
    lengths = norms / jnp.where(largest > 0, largest, 1)
    difference = lengths[:, None] - lengths[None, :]
    angle = 2 * lengths[:, None] * lengths[None, :] * (1 - cosine)
    squares = difference * difference + jnp.maximum(angle, 0)
    if squared:
        return squares
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _lowest(scores: jax.Array, active: jax.Array, number: int) -> jax.Array:
    """Equal weights on the `number` lowest scores; those that tie for the last place share it."""
    dtype = scores.dtype
    count = jnp.minimum(jnp.sum(active, dtype=jnp.int32), number)
    last = jnp.sort(scores)[jnp.maximum(count - 1, 0)]
    below, tied = active & (scores < last), active & (scores == last)
    left = count - jnp.sum(below, dtype=jnp.int32)
    share = left.astype(dtype) / jnp.maximum(jnp.sum(tied, dtype=jnp.int32), 1).astype(dtype)
    chosen = below.astype(dtype) + jnp.where(tied, share, 0)
    return chosen / jnp.maximum(count, 1).astype(dtype)


METHOD = Method(
    name="krum",
    factory=krum,
    needs=("gram",),
    family="from_gram",
    scale="mean",
    reference="Blanchard et al., Machine Learning with Adversaries, 2017",
    make=krum,
    properties=frozenset({"permutation", "scale", "simplex", "split"}),
)
