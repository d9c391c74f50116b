"""AdaTask: separate optimizer statistics per task."""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import task_tree
from mtl_optax.core.factory import Transformation, factory
from mtl_optax.core.types import AxisName, DType
from mtl_optax.rule import Method, StepInputs, UpdateRule, from_rule
from mtl_optax.wrappers.per_task import init_each, update_each


@factory
def adatask(
    tasks: int | Collection[str], inner: Transformation, *, axis_name: AxisName = None
) -> Method:
    r"""Sums the steps of one adaptive optimizer per task.

    If Adam is applied to the summed gradient, the task with the largest gradients dominates the second
    moment, and so determines the step size of all tasks. AdaTask keeps separate optimizer statistics per
    task.

    With one copy of ``inner``, and of its state, per task:

    .. math:: update = \sum_t \mathrm{inner}_t(g_t)

    Scale: the method's own; with Adam each entry moves by up to T learning rates. Algorithm 2 of the
    paper.

    Args:
      tasks: T, or the task names.
      inner: the adaptive scaling without the learning rate, such as `optax.scale_by_adam()` or
        `optax.scale_by_rms()`. Put `optax.scale_by_learning_rate` after the method.
      axis_name: see `MethodOptions`.

    Returns:
      A `Method`; `state.rule_state` is the state of `inner` with a task axis. Cost: T steps of `inner`;
      memory: T states of `inner`.

    Notes:
      The method is equal to `optax.chain(per_task(inner, T), sum_tasks(T))`, but its statistics are at
      least float32.

      As in the authors' code, a zero gradient decays the moments of its task, and the remaining momentum
      still contributes to the update. The state of a task that is excluded by `active=` does not change.
      With one task, the method is `inner` itself. In the authors' code, task-specific parameters have one
      ordinary optimizer (use `optax.partition`).

    Example:

      >>> import jax.numpy as jnp, optax, mtl_optax as mtl
      >>> tx = mtl.adatask(2, optax.scale_by_adam())
      >>> grads = jnp.array([[100., 1.], [0.01, -1.]])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> [round(float(x), 3) for x in update]
      [2.0, 0.0]

    References:
      Yang, Pan, Wang, Yu, Shen, Chen, Xiao, Jiang and Guo, AdaTask: A Task-Aware Adaptive Learning Rate
      Approach to Multi-Task Learning, 2023, https://arxiv.org/abs/2211.15055
    """

    def init(params: optax.Params, num_tasks: int, dtype: DType) -> optax.OptState:
        # Called inside `init_each`, which replaces shapes by arrays.
        widened = optax.GradientTransformation(
            lambda params: inner.init(_widen(params)), inner.update
        )
        return init_each(widened, params, num_tasks)

    def apply(
        inputs: StepInputs, state: optax.OptState
    ) -> tuple[optax.Updates, jax.Array, optax.OptState]:
        params = None if inputs.params is None else _widen(inputs.params)
        steps, state = update_each(inner, _widen(inputs.updates), state, params, inputs.active, {})
        # The gradients of absent tasks are 0 here, and `update_each` passes them on unchanged.
        update = jax.tree.map(lambda step: jnp.sum(step, axis=0), steps)
        return update, jnp.ones(inputs.active.shape, inputs.dtype), state

    rule = UpdateRule(frozenset({"gradients"}), apply, init)
    return from_rule("adatask", tasks, rule, axis_name=axis_name)


def _widen(tree: optax.Params) -> optax.Params:
    """Casts to at least float32: squares of float16 numbers soon leave its range."""
    return jax.tree.map(lambda x: x.astype(task_tree.statistics_dtype(x)), tree)
