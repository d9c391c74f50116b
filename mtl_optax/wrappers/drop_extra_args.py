"""Hides extra arguments from a transformation."""

from __future__ import annotations

import optax


def drop_extra_args(
    inner: optax.GradientTransformation, *names: str
) -> optax.GradientTransformationExtraArgs:
    """Removes extra arguments before a transformation that rejects unknown ones.

    The line searches of optax pass every extra argument to their `value_fn`, so they raise on `losses=`,
    which a method in the same chain needs. Wrap the line search in `drop_extra_args(inner, "losses")`.

    Args:
      inner: the transformation to wrap.
      *names: the extra arguments to remove.

    Returns:
      A transformation that calls `inner` without these arguments.

    Raises:
      ValueError: if no name is given.

    Example:

      >>> import jax.numpy as jnp, optax, mtl_optax as mtl
      >>> tx = mtl.drop_extra_args(optax.scale(2.0), "losses")
      >>> tx.update(jnp.ones(1), tx.init(jnp.zeros(1)), losses=jnp.ones(2))[0].tolist()
      [2.0]
    """
    if not names:
        raise ValueError("drop_extra_args: name the extra arguments to drop, such as 'losses'.")
    inner = optax.with_extra_args_support(inner)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        kept = {name: value for name, value in extra_args.items() if name not in names}
        return inner.update(updates, state, params, **kept)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
