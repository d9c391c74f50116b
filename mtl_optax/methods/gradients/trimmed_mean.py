"""Trimmed mean: the average without the extreme gradients, at every coordinate."""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import factory
from mtl_optax.core.task_tree import along_tasks, statistics_dtype, sum_over
from mtl_optax.core.types import AxisName
from mtl_optax.core.validation import check_integer, read_tasks
from mtl_optax.rule import Method, StepInputs, UpdateRule, from_rule


@factory
def trimmed_mean(
    tasks: int | Collection[str], *, trim_number: int = 1, axis_name: AxisName = None
) -> Method:
    r"""Averages every coordinate without its largest and smallest gradients.

    A few outlying tasks cannot dominate this mean: of the T numbers of a coordinate, the k =
    ``trim_number`` largest and the k smallest are dropped. With T = 2k + 1 it is the median.

    .. math:: update = \frac{1}{T - 2k} \sum_{i=k+1}^{T-k} g_{(i)}, \qquad g_{(1)} \le \dots \le g_{(T)}

    Scale: mean-like. Definition 2 of the paper, with :math:`k = \beta T`.

    Args:
      tasks: T, or the task names.
      trim_number: k, a Python integer with T >= 2k + 1.
      axis_name: see `MethodOptions`.

    Returns:
      A `Method` whose rule has no state. `state.weights` are each task's mean weight over the elements.
      Cost: :math:`T^2` comparisons per element in one pass.

    Raises:
      ValueError: if `trim_number` is negative, or too large for T.

    Notes:
      The method was made for distributed learning with faulty workers, where all gradients estimate the
      same vector. On different tasks it drops the gradients that differ most.

      Zeros count like any other value. If fewer than 2k + 1 tasks are present, the update is their
      median. With one task, k must be 0, and the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.trimmed_mean(3)
      >>> grads = jnp.array([[1., 5.], [2., -9.], [30., 4.]])
      >>> tx.update(grads, tx.init(jnp.zeros(2)))[0].tolist()
      [2.0, 4.0]

    References:
      Yin, Chen, Ramchandran and Bartlett, Byzantine-Robust Distributed Learning: Towards Optimal
      Statistical Rates, 2018, https://arxiv.org/abs/1803.01498
    """
    axis = read_tasks("trimmed_mean", tasks)
    check_integer("trimmed_mean", "trim_number", trim_number, 0, (axis.number - 1) // 2)

    def apply(
        inputs: StepInputs, state: optax.OptState
    ) -> tuple[optax.Updates, jax.Array, optax.OptState]:
        present = jnp.sum(inputs.active, dtype=jnp.int32)
        trim = jnp.clip((present - 1) // 2, 0, trim_number)
        last = present - trim
        count = jnp.maximum(last - trim, 1)
        leaves, treedef = jax.tree.flatten(inputs.updates)
        update, kept_entries, entries = [], jnp.zeros((axis.number,), inputs.dtype), 0
        for leaf in leaves:
            ranks = _ranks(leaf, inputs.active)
            kept = (ranks >= trim) & (ranks < last) & along_tasks(inputs.active, leaf.ndim)
            wide = leaf.astype(statistics_dtype(leaf))
            # The division is before the sum, which may overflow even if the mean does not.
            share = wide / count.astype(wide.dtype)
            update.append(jnp.sum(jnp.where(kept, share, 0), axis=0))
            axes = tuple(range(1, leaf.ndim))
            kept_entries = kept_entries + jnp.sum(kept.astype(inputs.dtype), axis=axes)
            entries += leaf[0].size
        kept_entries = sum_over(kept_entries, axis_name)
        entries = sum_over(jnp.asarray(max(entries, 1), inputs.dtype), axis_name)
        weights = kept_entries / (count.astype(inputs.dtype) * entries)
        return jax.tree.unflatten(treedef, update), weights, state

    rule = UpdateRule(frozenset({"gradients"}), apply)
    return from_rule("trimmed_mean", axis, rule, axis_name=axis_name)


def _ranks(leaf: jax.Array, active: jax.Array) -> jax.Array:
    """Returns the rank of every entry among the active tasks; ties are ordered by task index.

    The comparison of all pairs fuses with the surrounding code; a sort would need a separate pass.
    """
    axis = jnp.arange(leaf.shape[0], dtype=jnp.int32)
    earlier = along_tasks(axis, leaf.ndim)[None] < along_tasks(axis, leaf.ndim)[:, None]
    mine, other = leaf[:, None], leaf[None]
    below = (other < mine) | ((other == mine) & earlier)
    counted = below & along_tasks(active, leaf.ndim)[None]
    return jnp.sum(counted, axis=1, dtype=jnp.int32)
