"""What a user's loss function returns: an array `[T]`, or a dictionary of scalars by task name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def loss_vector(losses: Any) -> jax.Array:
    """The losses as one floating array `[T]`; those of a dictionary in the order of its sorted names.

    Args:
      losses: what the user's function returned.

    Returns:
      The losses `[T]`.

    Raises:
      TypeError: for a tuple or list, or numbers that are not real floating point.
      ValueError: for losses that are not one-dimensional, or a dictionary of more than scalars.

    Example:

      >>> import jax.numpy as jnp
      >>> loss_vector({"click": jnp.array(1.0), "buy": jnp.array(2.0)}).tolist()
      [2.0, 1.0]
    """
    if isinstance(losses, Mapping):
        wrong = {name: jnp.shape(loss) for name, loss in losses.items() if jnp.shape(loss) != ()}
        if wrong:
            name, shape = next(iter(wrong.items()))
            raise ValueError(
                "a dictionary of losses must hold one scalar per task; found shape "
                f"{shape} for {name!r}."
            )
        if not losses:
            raise ValueError("a dictionary of losses must hold one scalar per task; found none.")
        losses = jnp.stack([jnp.asarray(losses[name]) for name in sorted(losses)])
    if isinstance(losses, (tuple, list)):
        raise TypeError(
            f"loss_fn must return one array [T] or a dictionary of scalars, found a "
            f"{type(losses).__name__} of {len(losses)}: return jnp.stack([...]) of the losses, or a "
            "dictionary of them by task name (and pass has_aux=True where the second output is auxiliary)."
        )
    if jnp.ndim(losses) != 1:
        raise ValueError(
            "loss_fn must return one loss per task, an array [T] or a dictionary of scalars; found shape "
            f"{jnp.shape(losses)}. Return jnp.stack([...]) of the losses, or a dictionary of them by task "
            "name, instead of their sum."
        )
    if not jnp.issubdtype(jnp.result_type(losses), jnp.floating):
        raise TypeError(f"losses must be real floating point, found {jnp.result_type(losses)}.")
    return jnp.asarray(losses)


def split_result(result: Any, has_aux: bool) -> tuple[jax.Array, Any]:
    """The loss vector of what a user's function returned, and what to return in its place.

    Args:
      result: losses, or `(losses, aux)` with `has_aux`.
      has_aux: as in `jax.value_and_grad`.

    Returns:
      `(losses [T], result)`.

    Raises:
      As `loss_vector`.

    Example:

      >>> import jax.numpy as jnp
      >>> split_result((jnp.ones(2), "aux"), has_aux=True)[0].tolist()
      [1.0, 1.0]
    """
    return loss_vector(result[0] if has_aux else result), result


def check_differentiable(name: str, params: Any) -> None:
    """Raises where `params` hold what has no gradient, as `jax.grad` does.

    Args:
      name: whose error it is.
      params: what is differentiated by.

    Raises:
      TypeError: with the leaf's path. A Flax module with counters (of its random numbers, say) among its
        parameters would otherwise keep all of them fixed.

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
