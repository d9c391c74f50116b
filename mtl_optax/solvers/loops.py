"""The initial state of a `lax.while_loop` or `lax.scan` under `shard_map`."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

State = TypeVar("State")


def varying_like(x: jax.Array, start: State) -> State:
    """`start` with the varying type of `x`: the initial state of a loop whose states depend on `x`.

    Inside `shard_map` the type of a value contains the mapped axes over which it varies, and the type of
    the state of a loop must not change. The values stay the same: both branches of the `where` are equal,
    and XLA removes it.
    """
    same = jnp.ravel(jnp.zeros_like(x))[0] == 0
    return jax.tree.map(lambda leaf: jnp.where(same, leaf, leaf), start)
