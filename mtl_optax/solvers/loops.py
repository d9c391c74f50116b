"""What loops on the device ask of the state that they start from."""

from typing import Any

import jax
import jax.numpy as jnp


def varying_like(x: jax.Array, start: Any) -> Any:
    """The first state of a loop whose later states are made of ``x``.

    Inside `shard_map` a value has a type that says over which mapped axes it differs, and a loop wants the
    same one from the start. The select is of equal numbers: nothing of it is left in the program.
    """
    same = jnp.ravel(jnp.zeros_like(x))[0] == 0
    return jax.tree.map(lambda leaf: jnp.where(same, leaf, leaf), start)
