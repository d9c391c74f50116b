"""Encodes the state of a method as a tree of floats, so that a backward pass can return it.

A backward pass returns the new state as a cotangent. A cotangent must have the dtype of its primal, and
integers have no cotangents. The state is therefore encoded as a *carrier*: the same tree, in which every
integer is split into 16-bit halves that float32 represents exactly.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax


def fork_init(method: optax.GradientTransformation, representation: optax.Params) -> optax.OptState:
    """Makes the carrier of a method's initial state, for `fork`.

    The carrier encodes the state `method.init(representation)` in float leaves. It can be donated,
    checkpointed and carried through `scan` like any other pytree. The values of the representation are
    not used.

    Args:
      method: any optax transformation that removes the task axis.
      representation: the shared representation or its `jax.ShapeDtypeStruct`, any pytree.

    Returns:
      The carrier.

    Raises:
      TypeError: if the state has a complex leaf, which cannot be encoded.

    Example:

      >>> import jax, jax.numpy as jnp, mtl_optax as mtl
      >>> carrier = mtl.fork_init(mtl.multibalance(2), jax.ShapeDtypeStruct((8, 4), jnp.float32))
      >>> {leaf.dtype.name for leaf in jax.tree.leaves(carrier)}
      {'float32'}

    References:
      He et al., MultiBalance, 2024, algorithm 3.
    """
    return encode_state(method.init(representation))


def fork_state(
    method: optax.GradientTransformation, carrier: optax.OptState, representation: optax.Params
) -> Any:
    """Decodes the optax state of a method from a carrier, for diagnostics and checkpoints.

    Args:
      method: the method whose state is encoded.
      carrier: from `fork_init`, or from the last backward pass.
      representation: the representation or its `jax.ShapeDtypeStruct`.

    Returns:
      The state, with the dtypes of `method.init(representation)`.

    Raises:
      ValueError: if the carrier is not of this method and representation.

    Example:

      >>> import jax, jax.numpy as jnp, mtl_optax as mtl
      >>> method, like = mtl.multibalance(2), jax.ShapeDtypeStruct((8, 4), jnp.float32)
      >>> int(mtl.fork_state(method, mtl.fork_init(method, like), like).balance_count)
      0

    References:
      He et al., MultiBalance, 2024, algorithm 3.
    """
    like = jax.eval_shape(method.init, representation)
    _check_carrier(carrier, jax.eval_shape(encode_state, like))
    return jax.tree.map(_decode, carrier, like)


def encode_state(state: optax.OptState) -> optax.OptState:
    """Encodes a state: integers and keys become 16-bit halves in float32, floats stay unchanged.

    Args:
      state: the state of any optax transformation.

    Returns:
      A pytree of floating arrays, from which `fork_state` recovers the state bit for bit.

    Example:

      >>> import jax.numpy as jnp
      >>> encode_state(jnp.int32(2**16 + 7)).tolist()
      [7.0, 1.0]
    """
    return jax.tree.map(_encode, state)


def _check_carrier(carrier: optax.OptState, like: optax.Params) -> None:
    wrong = (
        "fork: the carrier is not of this method and representation: make it with "
        "fork_init(method, representation). "
    )
    got, want = jax.tree.structure(carrier), jax.tree.structure(like)
    if got != want:
        raise ValueError(f"{wrong}Expected the structure {want}, found {got}.")
    leaves = jax.tree_util.tree_leaves_with_path(like)
    for (path, expected), leaf in zip(leaves, jax.tree.leaves(carrier), strict=True):
        if jnp.shape(leaf) != expected.shape or jnp.result_type(leaf) != expected.dtype:
            raise ValueError(
                f"{wrong}Leaf {jax.tree_util.keystr(path)} should be {expected.dtype} "
                f"{expected.shape}, found {jnp.result_type(leaf)} {jnp.shape(leaf)}."
            )


# --- integers as floats ------------------------------------------------------------------------------


def _encode(leaf: object) -> jax.Array:
    """Encodes `leaf` as a float array: itself, or 16-bit halves along a new last axis."""
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.float32)[..., None]
    if not jnp.issubdtype(leaf.dtype, jnp.integer):
        raise TypeError(f"fork: a state of dtype {leaf.dtype} cannot travel as a cotangent.")
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = lax.bitcast_convert_type(leaf, unsigned)
    count = max(1, leaf.dtype.itemsize // 2)
    mask = jnp.asarray(0xFFFF if leaf.dtype.itemsize > 1 else 0xFF, unsigned)
    halves = [(bits >> jnp.asarray(16 * k, unsigned)) & mask for k in range(count)]
    return jnp.stack([half.astype(jnp.float32) for half in halves], axis=-1)


def _decode(leaf: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Inverts `_encode`, for a leaf of the shape and dtype of `like`."""
    if jnp.issubdtype(like.dtype, jnp.floating):
        return leaf
    if like.dtype == jnp.bool_:
        return leaf[..., 0] > 0
    is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    dtype = jnp.dtype(jnp.uint32) if is_key else jnp.dtype(like.dtype)
    unsigned = jnp.dtype(f"uint{8 * dtype.itemsize}")
    bits = jnp.zeros(leaf.shape[:-1], unsigned)
    for k in range(leaf.shape[-1]):
        half = leaf[..., k].astype(jnp.uint32).astype(unsigned)
        bits = bits | (half << jnp.asarray(16 * k, unsigned))
    if is_key:
        return jax.random.wrap_key_data(bits, impl=_key_impl(like))
    return lax.bitcast_convert_type(bits, dtype)


def _key_impl(like: jax.ShapeDtypeStruct) -> Any:
    """Returns the generator of a key; `jax.random.key_impl` needs a tracer, not a shape."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
    return found[0]
