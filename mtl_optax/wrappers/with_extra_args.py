"""Gives extra arguments to a transformation whose caller passes none."""

from __future__ import annotations

import optax


def with_extra_args(
    inner: optax.GradientTransformation, **extra_args: object
) -> optax.GradientTransformationExtraArgs:
    """Passes extra arguments to a transformation whose caller passes none.

    Many trainers call `tx.update(grads, opt_state, params)`, so that a method in `tx` that needs
    `losses=` does not get them. Make the wrapper inside the step, where the losses are, and let the trainer
    update it. Its state is that of `inner`, so that nothing is initialised again.

    The wrapper holds arrays of the step and must not leave it. If the trainer's state keeps `tx` as a
    static field, as Flax's `TrainState` does, put the original back before the step returns:

    .. code-block:: python

       tx = mtl.with_extra_args(state.tx, losses=losses)
       state = state.replace(tx=tx).apply_gradients(grads=grads).replace(tx=state.tx)

    Args:
      inner: the optimizer, or any other transformation.
      **extra_args: the extra arguments of `inner.update`, such as `losses` and `active`.

    Returns:
      A transformation with the state of `inner`, which adds these arguments to those of the caller.

    Raises:
      TypeError: on `update`, if the caller passes one of these arguments too.

    Example:

      >>> import jax.numpy as jnp, optax, mtl_optax as mtl
      >>> tx = optax.chain(mtl.scale_invariant(2), optax.sgd(1.0))
      >>> state = tx.init(jnp.zeros(1))
      >>> given = mtl.with_extra_args(tx, losses=jnp.array([1.0, 4.0]))
      >>> given.update(jnp.array([[1.0], [4.0]]), state)[0].tolist()
      [-2.0]
    """
    inner = optax.with_extra_args_support(inner)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **others: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        return inner.update(updates, state, params, **extra_args, **others)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
