"""One task per step: differentiates one loss, for methods in `remember`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Concatenate, Literal, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.core.types import Losses
from mtl_optax.core.validation import check_choice, read_tasks, task_vector
from mtl_optax.placement.loss_vector import check_differentiable, split_result
from mtl_optax.placement.pull_back import vjp_of_losses

Params = TypeVar("Params")


def one_task_value_and_grad(
    loss_fn: Callable[Concatenate[Params, ...], Losses],
    tasks: int | Collection[str],
    *,
    order: Literal["cyclic", "random"] = "cyclic",
    seed: int = 0,
) -> Callable[..., tuple[jax.Array, tuple[Params, jax.Array]]]:
    """Differentiates one task per step, by one forward and one backward pass.

    A method on the parameters takes T backward passes per step. This function evaluates and
    differentiates only one task per step. `remember(method, decay)` stores the last gradients of the
    other tasks, so that the method still combines T gradients. With `conflict_free` as the method, this
    is M-ConFIG.

    Notes:
      The compiled program has one branch per task and executes one of them per step, so its size grows
      with T.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` returns a dictionary or tuple of scalars, or an array
        `[T]`. With an array (unless a final `jnp.stack` made it), a non-finite derivative of one task
        makes the gradients of the other tasks non-finite too.
      tasks: T, or the task names.
      order: "cyclic" takes task `step % T`; "random" draws the task of each step.
      seed: an integer, the seed of the random order.

    Returns:
      A function `fn(step, params, *args, **kwargs)` that returns `(losses, (updates, active))`: `active`,
      bool `[T]`, marks the task of this step. `losses` `[T]` and the leaves `[T, *shape]` of `updates`
      are 0 for the other tasks. `step` is an integer, such as the step count of an optimizer; it may be
      traced.

    Raises:
      ValueError: if `loss_fn` does not return one loss per task.
      TypeError: if a parameter is not real floating point.

    Example:

      >>> import jax.numpy as jnp, optax, mtl_optax as mtl
      >>> def loss_fn(w):
      ...     return (w ** 2).sum(), 3 * w.sum()
      >>> tx = mtl.remember(mtl.conflict_free(2), decay=0.9)
      >>> w, grad_fn = jnp.ones(2), mtl.one_task_value_and_grad(loss_fn, 2)
      >>> state = tx.init(w)
      >>> for step in range(2):
      ...     losses, (updates, active) = grad_fn(step, w)
      ...     update, state = tx.update(updates, state, w, losses=losses, active=active)
      >>> active.tolist(), update.round(3).tolist()
      ([False, True], [5.0, 5.0])

    References:
      Liu, Chu and Thuerey, ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks,
      2024, section 3.3, https://arxiv.org/abs/2408.11104
    """
    axis = read_tasks("one_task_value_and_grad", tasks)
    check_choice("one_task_value_and_grad", "order", order, ("cyclic", "random"))

    def value_and_grad(
        step: int | jax.Array, params: Params, *args: object, **kwargs: object
    ) -> tuple[jax.Array, tuple[Params, jax.Array]]:
        check_differentiable("one_task_value_and_grad", params)

        def only(t: int, params: Params) -> tuple[jax.Array, optax.Updates]:
            losses, pullback, given = vjp_of_losses(
                lambda params: split_result(loss_fn(params, *args, **kwargs), False), params
            )
            if losses.shape != (axis.number,):
                raise ValueError(
                    f"one_task_value_and_grad: loss_fn must return {axis.number} losses; found "
                    f"{losses.shape[0]}."
                )
            task_vector("one_task_value_and_grad", "the losses of loss_fn", given, axis)
            return losses[t], pullback.of_task(t)[0]

        branches = [lambda params, t=t: only(t, params) for t in range(axis.number)]
        task = _task_of(jnp.asarray(step), axis.number, order, seed)
        loss, gradient = lax.switch(task, branches, params)
        active = jnp.arange(axis.number) == task

        def in_slot(value: jax.Array) -> jax.Array:
            here = active.reshape((-1,) + (1,) * value.ndim)
            return jnp.where(here, value[None], jnp.zeros((), value.dtype))

        return in_slot(loss), (jax.tree.map(in_slot, gradient), active)

    return value_and_grad


def _task_of(step: jax.Array, num_tasks: int, order: str, seed: int) -> jax.Array:
    if order == "cyclic":
        return (step % num_tasks).astype(jnp.int32)
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.randint(key, (), 0, num_tasks, jnp.int32)
