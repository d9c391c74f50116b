"""What a state tells about the balance of the tasks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_optax.from_rule import BalanceState, decode_names


def diagnostics(state: Any) -> dict[str, Any]:
    """Reads weights, norms, cosines and skip counts out of any state that holds a method's.

    Works on the state of a method, of a chain or wrapper around it, and on a fork's carrier; outside
    jit where blocks have names, anywhere else for one block.

    Args:
      state: any pytree with the state of at least one method of this library.

    Returns:
      A dictionary with `weights` `[T]`, the weights used last, which multiply raw gradients; `norms`
      `[T]` and `cosines` `[T, T]` where the method computed them; `skipped` `[T]`, how often each task
      was excluded because it was not finite; `steps`, updates done. Where the method looks at several
      blocks, the first three map each block's name to its array. Several methods in one state: the
      first one's entries, and all of them in a list under `all`.

    Raises:
      ValueError: where there is no state of a method in `state`.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.metabalance(2)
      >>> grads = {"w": jnp.array([[3., 4.], [0., 10.]])}
      >>> _, state = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
      >>> told = mtl.diagnostics(state)
      >>> {name: [round(float(x), 2) for x in w] for name, w in told["weights"].items()}
      {"['w']": [1.0, 0.65]}
    """
    found = [_of_one(node) for node in _states(state)]
    if not found:
        raise ValueError(
            f"diagnostics: no state of a method of mtl_optax in a {type(state).__name__}; give the "
            "optimizer state that holds it."
        )
    return found[0] if len(found) == 1 else {**found[0], "all": found}


def head_weights(state: Any) -> jax.Array:
    """One weight a task, for the heads of papers that weigh the losses themselves.

    Args:
      state: any pytree with the state of a method of this library.

    Returns:
      `[T]`: the weights used last, averaged over blocks.

    Raises:
      ValueError: where there is no state of a method in `state`.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.fixed_weights(2, [1.0, 0.5])
      >>> _, state = tx.update(jnp.eye(2), tx.init(jnp.zeros(2)))
      >>> mtl.head_weights(state).tolist()
      [1.0, 0.5]
    """
    states = _states(state)
    if not states:
        raise ValueError(
            f"head_weights: no state of a method of mtl_optax in a {type(state).__name__}; give the "
            "optimizer state that holds it."
        )
    weights = jnp.asarray(states[0].weights)
    return weights.reshape(-1, weights.shape[-1]).mean(axis=0)


def _states(tree: Any) -> list[BalanceState]:
    is_state = lambda node: isinstance(node, BalanceState)  # noqa: E731
    return [node for node in jax.tree.leaves(tree, is_leaf=is_state) if is_state(node)]


def _of_one(state: BalanceState) -> dict[str, Any]:
    told: dict[str, Any] = {
        "weights": state.weights,
        "norms": state.norms,
        "cosines": state.cosine,
    }
    told = {name: value for name, value in told.items() if not isinstance(value, tuple)}
    if not isinstance(state.block_names, tuple):
        names = decode_names(np.asarray(_integers(state.block_names)).astype(np.uint8))
        told = {key: dict(zip(names, value, strict=True)) for key, value in told.items()}
    return {
        **told,
        "skipped": _integers(state.skipped),
        "steps": _integers(state.balance_count),
    }


def _integers(leaf: Any) -> jax.Array:
    """Integers as they are, or out of the halves of 16 bits in which a fork's carrier holds them."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    halves = [leaf[..., k].astype(jnp.int32) << (16 * k) for k in range(leaf.shape[-1])]
    return sum(halves, jnp.zeros(leaf.shape[:-1], jnp.int32))
