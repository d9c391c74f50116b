"""Trimmed mean: at every coordinate, the average of what is left without the extremes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_integer, check_num_tasks
from mtl_optax.from_gradients import TaskGradients, from_gradients
from mtl_optax.method import Method
from mtl_optax.task_tree import along_tasks, statistics_dtype


def trimmed_mean(num_tasks: int, *, trim_number: int = 1) -> optax.GradientTransformationExtraArgs:
    r"""Averages, at every coordinate, what is left without the largest and the smallest gradients.

    A mean that a few outlying tasks cannot drag away: of every coordinate's T numbers the k largest
    and the k smallest, k = ``trim_number``, are dropped. With T = 2k + 1 it is the median.

    .. math:: update = \frac{1}{T - 2k} \sum_{i=k+1}^{T-k} g_{(i)}, \qquad g_{(1)} \le \dots \le g_{(T)}.

    Mean-like. Made for distributed learning with faulty workers (definition 2 of the paper, with
    :math:`k = \beta T`), where all gradients estimate the same vector; on tasks that differ it drops
    the very tasks that pull.

    Degenerate input: zeros are values like any other. Where fewer than 2k + 1 tasks are present, as many
    are trimmed as leave one or two: the median. T = 1 needs k = 0.

    Args:
      num_tasks: T, static.
      trim_number: k, static, with T >= 2k + 1.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. The state's `weights` are each task's mean
      weight over the elements. Cost: T^2 comparisons an element in one pass, no state.

    Raises:
      ValueError: for a trim number below 0, or too large for T.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.trimmed_mean(3)
      >>> grads = jnp.array([[1., 5.], [2., -9.], [30., 4.]])
      >>> tx.update(grads, tx.init(jnp.zeros(2)))[0].tolist()
      [2.0, 4.0]

    References:
      Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, 2018.
    """
    num_tasks = check_num_tasks("trimmed_mean", num_tasks)
    check_integer("trimmed_mean", "trim_number", trim_number, 0, (num_tasks - 1) // 2)

    def apply(view: TaskGradients, state: Any) -> tuple[Any, jax.Array, Any]:
        present = jnp.sum(view.active, dtype=jnp.int32)
        trim = jnp.clip((present - 1) // 2, 0, trim_number)
        last = present - trim
        left = jnp.maximum(last - trim, 1)
        leaves, treedef = jax.tree.flatten(view.updates)
        update, kept_entries, entries = [], jnp.zeros((num_tasks,), view.dtype), 0
        for leaf in leaves:
            ranks = _ranks(leaf, view.active)
            kept = (ranks >= trim) & (ranks < last) & along_tasks(view.active, leaf.ndim)
            wide = leaf.astype(statistics_dtype(leaf))
            # Divided first: a sum of the largest numbers may overflow where their mean does not.
            share = wide / left.astype(wide.dtype)
            update.append(jnp.sum(jnp.where(kept, share, 0), axis=0))
            axes = tuple(range(1, leaf.ndim))
            kept_entries = kept_entries + jnp.sum(kept.astype(view.dtype), axis=axes)
            entries += leaf[0].size
        weights = kept_entries / (left.astype(view.dtype) * max(entries, 1))
        return jax.tree.unflatten(treedef, update), weights, state

    return from_gradients("trimmed_mean", num_tasks, lambda params, dtype: (), apply)


def _ranks(leaf: jax.Array, active: jax.Array) -> jax.Array:
    """For every entry, how many active tasks have a smaller one there; ties go by the task's number.

    Comparing all pairs fuses with what follows, where a sort would be a pass of its own.
    """
    tasks = jnp.arange(leaf.shape[0], dtype=jnp.int32)
    earlier = along_tasks(tasks, leaf.ndim)[None] < along_tasks(tasks, leaf.ndim)[:, None]
    mine, other = leaf[:, None], leaf[None]
    below = (other < mine) | ((other == mine) & earlier)
    counted = below & along_tasks(active, leaf.ndim)[None]
    return jnp.sum(counted, axis=1, dtype=jnp.int32)


METHOD = Method(
    name="trimmed_mean",
    factory=trimmed_mean,
    needs=("gradients",),
    family="from_gradients",
    scale="mean",
    reference="Yin et al., Byzantine-Robust Distributed Learning, 2018",
    make=lambda num_tasks: trimmed_mean(num_tasks, trim_number=min(1, (num_tasks - 1) // 2)),
    properties=frozenset({"permutation", "scale", "simplex", "split"}),
)
