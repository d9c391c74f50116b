"""AdaTask: every task keeps its own optimizer statistics."""

from __future__ import annotations

from typing import Any

import jax
import optax

from mtl_optax.arguments import check_num_tasks
from mtl_optax.combinators import per_task, sum_tasks
from mtl_optax.method import Method
from mtl_optax.task_tree import narrow, statistics_dtype


def adatask(
    num_tasks: int, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""Sums the steps of one adaptive optimizer per task.

    With one Adam on the summed gradient, the task with the largest gradients fills the second moment and
    so sets everybody's learning rate. Here each task divides by its own.

    .. math:: update = \sum_t \mathrm{inner}_t(g_t),

    one copy of ``inner`` and of its state a task: `chain(per_task(inner, T), sum_tasks(T))`, with the state
    in float32 where gradients are narrower, and nothing else. Sum-like: with Adam each entry moves by up
    to T learning rates. Algorithm 1 of the paper; as in the authors' program a step in which a task's
    gradient is 0 still decays its moments and takes its momentum's step. To leave a task out of a step say
    so by ``active=``: then its state stays as it was.
    Task-specific parameters get one ordinary optimizer there (`optax.partition`).

    Degenerate input: whatever ``inner`` makes of it. T = 1: ``inner`` itself.

    Args:
      num_tasks: T, static.
      inner: the adaptive scaling, without the learning rate: `optax.scale_by_adam()`,
        `optax.scale_by_rms()`, ... Follow it by `optax.scale_by_learning_rate`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`; an `optax.chain`, whose state is a pair.
      Memory: T states of `inner`.

    Raises:
      ValueError: where updates do not carry the task axis.

    Example:

      >>> import jax.numpy as jnp, numpy as np, optax, mtl_optax as mtl
      >>> tx = mtl.adatask(2, optax.scale_by_adam())
      >>> update, _ = tx.update(jnp.array([[100., 1.], [0.01, -1.]]), tx.init(jnp.zeros(2)))
      >>> np.array(update, float).round(3).tolist()
      [2.0, 0.0]

    References:
      Yang et al., AdaTask: A Task-Aware Adaptive Learning Rate Approach to Multi-Task Learning, 2023.
    """
    num_tasks = check_num_tasks("adatask", num_tasks)
    chain = optax.chain(per_task(_in_full_precision(inner), num_tasks), sum_tasks(num_tasks))
    return optax.with_extra_args_support(chain)


def _in_full_precision(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`inner` on float32 where gradients are narrower: squares of float16 leave its range at once."""
    inner = optax.with_extra_args_support(inner)

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(statistics_dtype(x)), tree)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        wide = None if params is None else widen(params)
        steps, state = inner.update(widen(updates), state, wide, **extra_args)
        return jax.tree.map(lambda step, g: narrow(step, g.dtype), steps, updates), state

    def init_fn(params: Any) -> Any:
        return inner.init(widen(params))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


METHOD = Method(
    name="adatask",
    factory=adatask,
    needs=("gradients",),
    family="from_gradients",
    scale="own",
    reference="Yang et al., AdaTask, 2023",
    make=lambda num_tasks: adatask(num_tasks, optax.scale_by_adam()),
    properties=frozenset({"permutation", "split"}),
)
