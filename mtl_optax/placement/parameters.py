"""Methods on the parameters: one gradient per task, by T backward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax.placement.pull_back import Mode, pull_each, vjp_of_losses


def per_task_value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    mode: Mode = "auto",
) -> Callable[..., Any]:
    """Differentiates a function that returns one loss per task.

    The counterpart of `jax.value_and_grad` for a `loss_fn` that returns an array `[T]`: row t of every
    gradient leaf is the gradient of loss t. One forward pass, T backward passes.

    Args:
      loss_fn: returns losses `[T]`, or `(losses, aux)` with `has_aux`.
      argnums: which positional arguments to differentiate, as in `jax.grad`.
      has_aux: whether `loss_fn` returns auxiliary data as well.
      mode: how the T backward passes run. "vmap": batched, T times the memory of the cotangents.
        "unroll": one after the other in one program, which XLA may overlap; the fastest on a CPU.
        "map": a loop with the memory of one backward pass beyond the result. "auto": "unroll" on a CPU
        for T <= 64 (at T = 32 it took 0.3 of the time of "map" and compiled no slower), "map" there for
        more tasks, "vmap" on accelerators. It looks at the backend of the tracing host: name the mode
        where you compile ahead of time for another one.

    Returns:
      A function of the same arguments that returns `(losses, grads)` or `((losses, aux), grads)`;
      leaves of `grads` are `[T, *shape]`.

    Raises:
      TypeError, ValueError: where `loss_fn` does not return a floating 1-D array, for parameters that have
        no gradient (integers, keys), or for an unknown mode.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> def loss_fn(w):
      ...     return jnp.stack([w @ w, 3 * w[0]])
      >>> losses, grads = mtl.per_task_value_and_grad(loss_fn)(jnp.array([1., 2.]))
      >>> losses.tolist(), grads.tolist()
      ([5.0, 3.0], [[2.0, 4.0], [3.0, 0.0]])

    References:
      The parameter gradients of MetaBalance: He et al., MetaBalance, 2022, algorithm 1.
    """
    _check_mode(mode)

    def value_and_grad(*args: Any, **kwargs: Any) -> Any:
        numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

        def of_chosen(*chosen: Any) -> Any:
            whole = list(args)
            for number, value in zip(numbers, chosen, strict=True):
                whole[number] = value
            result = loss_fn(*whole, **kwargs)
            losses, aux = result if has_aux else (result, None)
            return check_losses(losses), aux

        chosen = [args[n] for n in numbers]
        check_differentiable("per_task_value_and_grad", chosen)
        losses, pullback, aux = vjp_of_losses(of_chosen, *chosen)
        grads = pull_each(pullback, losses, mode)
        grads = grads[0] if isinstance(argnums, int) else grads
        return ((losses, aux) if has_aux else losses), grads

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

    Papers that weigh the losses themselves (EMTL eq. 13, MGDA, Nash-MTL) scale the heads too. Where
    every head belongs to one task, multiply: `jax.tree.map(lambda g: w[t] * g, head_grads[t])` with
    `w = mtl.head_weights(state)` from the state after `update`.

    Args:
      encode: `encode(shared, *args) -> representation`, any pytree.
      decode: `decode(heads, representation, *args) -> losses [T]`, or `(losses, aux)` with `has_aux`.
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
      Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, 2018, section 3.3.
    """
    _check_mode(mode)

    def value_and_grad(shared: Any, heads: Any, *args: Any) -> Any:
        check_differentiable("split_value_and_grad", (shared, heads))
        representation, pull_shared = jax.vjp(lambda s: encode(s, *args), shared)

        def losses_of(heads: Any, representation: Any) -> Any:
            result = decode(heads, representation, *args)
            losses, aux = result if has_aux else (result, None)
            return check_losses(losses), aux

        losses, pull_heads, aux = vjp_of_losses(losses_of, heads, representation)
        head_grads = pull_heads.whole(jnp.ones_like(losses))[0]
        shared_grads = pull_each(pull_heads, losses, mode, lambda grads: pull_shared(grads[1]))[0]
        return ((losses, aux) if has_aux else losses), (shared_grads, head_grads)

    return value_and_grad


def check_losses(losses: Any) -> jax.Array:
    """`losses` as a 1-D floating array, or an error that says how to make one.

    Args:
      losses: what the user's function returned.

    Returns:
      The losses `[T]`.

    Raises:
      TypeError: where they are a tuple or list, or no real floating numbers.
      ValueError: where they are not one-dimensional.

    Example:

      >>> import jax.numpy as jnp
      >>> check_losses(jnp.array([1.0, 2.0])).shape
      (2,)
    """
    if isinstance(losses, (tuple, list)):
        raise TypeError(
            f"loss_fn must return one array [T], found a {type(losses).__name__} of {len(losses)}: "
            "jnp.stack the losses (and pass has_aux=True where the second output is auxiliary)."
        )
    if jnp.ndim(losses) != 1:
        raise ValueError(
            f"loss_fn must return one loss per task, an array [T]; found shape {jnp.shape(losses)}. "
            "Return jnp.stack([...]) of the losses instead of their sum."
        )
    if not jnp.issubdtype(jnp.result_type(losses), jnp.floating):
        raise TypeError(f"losses must be real floating point, found {jnp.result_type(losses)}.")
    return jnp.asarray(losses)


def check_differentiable(name: str, params: Any) -> None:
    """Raises where `params` hold what has no gradient, as `jax.grad` does.

    Args:
      name: whose error it is.
      params: what is differentiated by.

    Returns:
      None.

    Raises:
      TypeError: with the leaf's path. A Flax module with counters (of its random numbers, say) among its
        parameters would otherwise train with all of them standing still.

    Example:

      >>> import jax.numpy as jnp
      >>> check_differentiable("per_task_value_and_grad", {"w": jnp.ones(2)})
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"{name}: cannot differentiate by the leaf {jax.tree_util.keystr(path)} of "
                f"{jnp.result_type(leaf)}. Pass what is no parameter as another argument; of an nnx.Module "
                "differentiate by nnx.split(model, nnx.Param, ...)."
            )


def _check_mode(mode: Any) -> None:
    if mode not in ("auto", "vmap", "unroll", "map"):
        raise ValueError(f'mode must be "auto", "vmap", "unroll" or "map"; found {mode!r}.')
