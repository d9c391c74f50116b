"""Methods on the parameters: one gradient per task, by T backward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax.core.arguments import check_choice
from mtl_optax.core.tasks import read_tasks
from mtl_optax.placement.loss_vector import check_differentiable, split_result
from mtl_optax.placement.pull_back import Mode, pull_each, vjp_of_losses


def per_task_value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    mode: Mode = "auto",
) -> Callable[..., Any]:
    """Differentiates a function that returns one loss per task.

    The counterpart of `jax.value_and_grad` for a `loss_fn` that returns an array `[T]` or a dictionary of
    scalars: row t of every gradient leaf is the gradient of loss t. Rows stand in the order of the array,
    or of the sorted names. One forward pass, T backward passes.

    Args:
      loss_fn: returns the losses, or `(losses, aux)` with `has_aux`.
      argnums: which positional arguments to differentiate, as in `jax.grad`.
      has_aux: whether `loss_fn` returns auxiliary data as well.
      mode: how the T backward passes run. "vmap": batched, T times the memory of the cotangents.
        "unroll": one after the other in one program, which XLA may overlap; the fastest on a CPU.
        "map": a loop with the memory of one backward pass beyond the result. "auto": "unroll" on a CPU
        for T <= 64 (at T = 32 it took 0.3 of the time of "map" and compiled no slower), "map" there for
        more tasks, "vmap" on accelerators. It looks at the backend of the tracing host: name the mode
        when you compile ahead of time for another one.

    Returns:
      A function of the same arguments that returns `(losses, grads)` or `((losses, aux), grads)`; the
      losses are what `loss_fn` returned, and leaves of `grads` are `[T, *shape]`.

    Raises:
      TypeError, ValueError: if `loss_fn` does not return one scalar per task, for parameters that have no
        gradient (integers, keys), or for an unknown mode.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> def loss_fn(w):
      ...     return jnp.stack([w @ w, 3 * w[0]])
      >>> losses, grads = mtl.per_task_value_and_grad(loss_fn)(jnp.array([1., 2.]))
      >>> losses.tolist(), grads.tolist()
      ([5.0, 3.0], [[2.0, 4.0], [3.0, 0.0]])

    References:
      The parameter gradients of MetaBalance: He et al., MetaBalance, 2022, algorithm 1,
      https://arxiv.org/abs/2203.06801
    """
    check_choice("per_task_value_and_grad", "mode", mode, ("auto", "vmap", "unroll", "map"))

    def value_and_grad(*args: Any, **kwargs: Any) -> Any:
        numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

        def of_chosen(*chosen: Any) -> Any:
            whole = list(args)
            for number, value in zip(numbers, chosen, strict=True):
                whole[number] = value
            return split_result(loss_fn(*whole, **kwargs), has_aux)

        chosen = [args[n] for n in numbers]
        check_differentiable("per_task_value_and_grad", chosen)
        losses, pullback, result = vjp_of_losses(of_chosen, *chosen)
        grads = pull_each(pullback, losses, mode)
        return result, grads[0] if isinstance(argnums, int) else grads

    return value_and_grad


def split_value_and_grad(
    encode: Callable[..., Any],
    decode: Callable[..., Any],
    has_aux: bool = False,
    *,
    mode: Mode = "auto",
) -> Callable[..., Any]:
    """Differentiates a shared bottom task by task, and the heads once.

    The losses are `decode(heads, encode(shared, *args), *args)`. Gradients of `shared` come one per
    task, by T backward passes through `encode`; those of `heads` are of the plain sum of losses, as in
    MetaBalance and MultiBalance, from one backward pass.

    Notes:
      Papers that weigh the losses themselves (EMTL eq. 13, MGDA, Nash-MTL) scale the heads too. Where
      every head belongs to one task, multiply: `jax.tree.map(lambda g: w[t] * g, head_grads[t])` with
      `w = mtl.head_weights(state)` from the state after `update`.

    Args:
      encode: `encode(shared, *args) -> representation`, any pytree.
      decode: `decode(heads, representation, *args)` returns losses `[T]` or a dictionary of scalars, or
        `(losses, aux)` with `has_aux`.
      has_aux: whether `decode` returns auxiliary data as well.
      mode: as in `per_task_value_and_grad`.

    Returns:
      A function `fn(shared, heads, *args)` that returns `(losses, (shared_grads, head_grads))`, with
      `(losses, aux)` for `losses` where `has_aux`. Leaves of `shared_grads` are `[T, *shape]`, those of
      `head_grads` as in `heads`.

    Raises:
      TypeError, ValueError: as `per_task_value_and_grad`.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> encode = lambda shared, x: x * shared
      >>> decode = lambda heads, h, x: jnp.stack([heads[0] * h, heads[1] * h ** 2])
      >>> fn = mtl.split_value_and_grad(encode, decode)
      >>> losses, (shared, heads) = fn(jnp.asarray(2.0), [jnp.asarray(1.0)] * 2, 3.0)
      >>> losses.tolist(), shared.tolist(), [float(h) for h in heads]
      ([6.0, 36.0], [3.0, 36.0], [6.0, 36.0])

    References:
      Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, 2018, section 3.3,
      https://arxiv.org/abs/1810.04650
    """
    check_choice("split_value_and_grad", "mode", mode, ("auto", "vmap", "unroll", "map"))

    def value_and_grad(shared: Any, heads: Any, *args: Any) -> Any:
        check_differentiable("split_value_and_grad", (shared, heads))
        representation, pull_shared = jax.vjp(lambda s: encode(s, *args), shared)

        def losses_of(heads: Any, representation: Any) -> Any:
            return split_result(decode(heads, representation, *args), has_aux)

        losses, pull_heads, result = vjp_of_losses(losses_of, heads, representation)
        head_grads = pull_heads.whole(jnp.ones_like(losses))[0]
        shared_grads = pull_each(pull_heads, losses, mode, lambda grads: pull_shared(grads[1]))[0]
        return result, (shared_grads, head_grads)

    return value_and_grad


def stack_tasks(gradients_by_name: Mapping[str, Any], names: Any) -> tuple[Any, jax.Array]:
    """Stacks gradients that were computed one task at a time.

    For one data loader per task, or for a subset of the tasks in each step: the slots of tasks without a
    gradient are filled with zeros and marked as absent.

    Args:
      gradients_by_name: the gradient of each task of this step, trees of one structure.
      names: all task names, in any order; or a `Method` that has them.

    Returns:
      `(updates, active)`: a tree with leaves `[T, *shape]`, and bool `[T]`, both in the order of the sorted
      names, for `method.update(updates, state, params, active=active)`.

    Raises:
      ValueError: for an unknown task, no gradient at all, or gradients of different structure or shape.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> names = ("click", "buy")
      >>> updates, active = mtl.stack_tasks({"click": {"w": jnp.ones(3)}}, names)
      >>> updates["w"].tolist(), active.tolist()
      ([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], [False, True])
    """
    tasks = read_tasks("stack_tasks", getattr(names, "tasks", names))
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
