"""Methods on the parameters: T backward passes give one gradient per task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Concatenate, TypeVar, cast, get_args

import jax
import jax.numpy as jnp

from mtl_optax.core.method import Method
from mtl_optax.core.validation import check_choice, read_tasks
from mtl_optax.placement.loss_vector import Split, check_differentiable, split_result
from mtl_optax.placement.pull_back import Mode, pull_each, vjp_of_losses

Result = TypeVar("Result")
Shared = TypeVar("Shared")
Heads = TypeVar("Heads")
Representation = TypeVar("Representation")
Tree = TypeVar("Tree")


def per_task_value_and_grad(
    loss_fn: Callable[..., Result],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    mode: Mode = "auto",
) -> Callable[..., tuple[Result, Any]]:
    """Differentiates a function that returns one loss per task.

    The counterpart of `jax.value_and_grad` for a `loss_fn` that returns a dictionary or tuple of scalars,
    or an array `[T]`. Row t of every gradient leaf is the gradient of loss t. The rows are in the order
    of the sorted names, of the tuple or of the array. It takes one forward pass and T backward passes.

    Notes:
      If the losses are a dictionary or tuple, "unroll" (and "auto" up to 64 tasks) differentiates every
      loss separately. Each backward pass then goes through the head of one task only. A non-finite
      derivative of one task does not affect the rows of the others, so the method excludes only this
      task.

      An array of losses (from a `vmap` over heads), and the modes "vmap" and "map", cannot separate the
      tasks, except that "unroll" separates the losses of a final `jnp.stack`. Each of the T backward
      passes then goes through all T heads, with cotangents of 0 for the other losses. If the derivative
      of one head is not finite, every row is NaN, because 0 times NaN is NaN, and the method excludes all
      tasks. `diagnostics` shows these counts as `skipped`. The same is true for heads inside one
      `custom_vjp`.

    Args:
      loss_fn: returns the losses, or `(losses, aux)` with `has_aux`. Prefer a dictionary or tuple to an
        array.
      argnums: the positional arguments with respect to which to differentiate, as in `jax.grad`.
      has_aux: whether `loss_fn` returns auxiliary data as well.
      mode: how the T backward passes are executed. "unroll" runs them one by one without a loop: it is
        the fastest mode and separates the tasks, but tracing time grows with the square of T. "vmap"
        batches them, and takes T times the memory of the cotangents. "map" runs them in a loop, with the
        memory of one backward pass besides the result. "auto" is "unroll" for T <= 64 (T <= 8 if the
        losses are an array) and "map" for more tasks.

    Returns:
      A function of the same arguments that returns `(losses, grads)` or `((losses, aux), grads)`. The
      losses are those that `loss_fn` returns, and the leaves of `grads` are `[T, *shape]`.

    Raises:
      TypeError, ValueError: if `loss_fn` does not return one scalar per task, a parameter is not real
        floating point, or the mode is unknown.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> def loss_fn(w):
      ...     return {"square": w @ w, "line": 3 * w[0]}
      >>> losses, grads = mtl.per_task_value_and_grad(loss_fn)(jnp.array([1., 2.]))
      >>> float(losses["line"]), grads.tolist()
      (3.0, [[3.0, 0.0], [2.0, 4.0]])

    References:
      The parameter gradients of MetaBalance: He et al., MetaBalance, 2022, algorithm 1,
      https://arxiv.org/abs/2203.06801
    """
    check_choice("per_task_value_and_grad", "mode", mode, get_args(Mode))

    def value_and_grad(*args: object, **kwargs: object) -> tuple[Result, Any]:
        numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        chosen = [args[n] for n in numbers]

        def of_chosen(*chosen: object) -> Split[Result]:
            whole = list(args)
            for number, value in zip(numbers, chosen, strict=True):
                whole[number] = value
            return split_result(loss_fn(*whole, **kwargs), has_aux)

        for value in chosen:
            check_differentiable("per_task_value_and_grad", value)
        losses, pullback, result = vjp_of_losses(of_chosen, *chosen)
        grads = pull_each(pullback, losses, mode, lambda grads: grads)
        return result, grads[0] if isinstance(argnums, int) else grads

    return value_and_grad


def split_value_and_grad(
    encode: Callable[Concatenate[Shared, ...], Representation],
    decode: Callable[Concatenate[Heads, Representation, ...], Result],
    has_aux: bool = False,
    *,
    mode: Mode = "auto",
) -> Callable[..., tuple[Result, tuple[Shared, Heads]]]:
    """Differentiates the shared parameters per task, and the heads once.

    The losses are `decode(heads, encode(shared, *args), *args)`. T backward passes through `encode` give
    one gradient of `shared` per task. One backward pass gives the gradient of the plain sum of losses
    with respect to `heads`, as in MetaBalance and MultiBalance.

    Notes:
      If `decode` returns a dictionary or tuple, a non-finite derivative of one task does not affect the
      rows of the other tasks in `shared_grads` with the modes "unroll" and "auto" (up to 64 tasks). With
      an array `[T]`, "vmap" or "map" it does; see `per_task_value_and_grad`. The gradient of the head of
      this task is not finite: `skip_nonfinite` around the optimizer of the heads skips such a step.

      Some papers weight the losses (EMTL eq. 13, MGDA, Nash-MTL), and so the gradients of the heads too.
      If every head belongs to one task, multiply them: `jax.tree.map(lambda g: w[t] * g, head_grads[t])`
      with `w = mtl.head_weights(state)`, where `state` is the state after `update`.

    Args:
      encode: `encode(shared, *args) -> representation`, any pytree.
      decode: `decode(heads, representation, *args)` returns a dictionary or tuple of scalars, or an array
        `[T]`; `(losses, aux)` with `has_aux`.
      has_aux: whether `decode` returns auxiliary data as well.
      mode: as in `per_task_value_and_grad`.

    Returns:
      A function `fn(shared, heads, *args, **kwargs)` that returns `(losses, (shared_grads, head_grads))`,
      or `((losses, aux), (shared_grads, head_grads))` with `has_aux`. `args` and `kwargs` are passed to
      `encode` and `decode`. The leaves of `shared_grads` are `[T, *shape]`, and those of `head_grads`
      have the shapes of `heads`.

    Raises:
      TypeError, ValueError: as in `per_task_value_and_grad`.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> encode = lambda shared, x: x * shared
      >>> decode = lambda heads, h, x: (heads[0] * h, heads[1] * h ** 2)
      >>> fn = mtl.split_value_and_grad(encode, decode)
      >>> losses, (shared, heads) = fn(jnp.asarray(2.0), [jnp.asarray(1.0)] * 2, 3.0)
      >>> float(losses[1]), shared.tolist(), [float(h) for h in heads]
      (36.0, [3.0, 36.0], [6.0, 36.0])

    References:
      Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, 2018, section 3.3,
      https://arxiv.org/abs/1810.04650
    """
    check_choice("split_value_and_grad", "mode", mode, get_args(Mode))

    def value_and_grad(
        shared: Shared, heads: Heads, *args: object, **kwargs: object
    ) -> tuple[Result, tuple[Shared, Heads]]:
        for part in (shared, heads):
            check_differentiable("split_value_and_grad", part)
        representation, pull_shared = jax.vjp(lambda s: encode(s, *args, **kwargs), shared)

        def losses_of(heads: Heads, representation: Representation) -> Split[Result]:
            return split_result(decode(heads, representation, *args, **kwargs), has_aux)

        losses, pull_heads, result = vjp_of_losses(losses_of, heads, representation)
        head_grads = pull_heads.whole(jnp.ones_like(losses))[0]
        shared_grads = pull_each(pull_heads, losses, mode, lambda grads: pull_shared(grads[1]))[0]
        return result, cast("tuple[Shared, Heads]", (shared_grads, head_grads))

    return value_and_grad


def stack_tasks(
    gradients_by_name: Mapping[str, Tree], names: Collection[str] | Method
) -> tuple[Tree, jax.Array]:
    """Stacks gradients that were computed separately per task.

    It is meant for one data loader per task, or for a subset of the tasks per step. The entries of tasks
    without a gradient are 0, and these tasks are marked as absent.

    Args:
      gradients_by_name: the gradient of each task of this step; all have the same tree structure.
      names: all task names, in any order, or a `Method` with named tasks.

    Returns:
      `(updates, active)`: a tree with leaves `[T, *shape]`, and bool `[T]`, both in the order of the sorted
      names, for `method.update(updates, state, params, active=active)`.

    Raises:
      TypeError: if `names` contains no names.
      ValueError: if a task is unknown, there is no gradient, or gradients differ in structure or shape.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> names = ("click", "buy")
      >>> updates, active = mtl.stack_tasks({"click": {"w": jnp.ones(3)}}, names)
      >>> updates["w"].tolist(), active.tolist()
      ([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], [False, True])
    """
    tasks = read_tasks("stack_tasks", names.tasks if isinstance(names, Method) else names)
    if tasks.names is None:
        raise TypeError(
            "stack_tasks: names must be the names of all tasks; found only their number."
        )
    unknown = sorted(set(gradients_by_name) - set(tasks.names))
    if unknown or not gradients_by_name:
        raise ValueError(
            f"stack_tasks: give the gradients of at least one of the tasks {list(tasks.names)}; found "
            f"{sorted(gradients_by_name)}."
        )
    first, like = next(iter(gradients_by_name.items()))
    for name, tree in gradients_by_name.items():
        same = jax.tree.structure(tree) == jax.tree.structure(like)
        if not same or jax.tree.map(jnp.shape, tree) != jax.tree.map(jnp.shape, like):
            raise ValueError(
                f"stack_tasks: the gradients of {first!r} and {name!r} differ in structure or shape: "
                f"{jax.tree.map(jnp.shape, like)} and {jax.tree.map(jnp.shape, tree)}."
            )
    empty = jax.tree.map(jnp.zeros_like, like)
    rows = [gradients_by_name.get(name, empty) for name in tasks.names]
    active = jnp.asarray([name in gradients_by_name for name in tasks.names])
    return jax.tree.map(lambda *row: jnp.stack(row), *rows), active
