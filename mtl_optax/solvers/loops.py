"""Loops of solvers: `lax.while_loop` until a solver is done, and loop states under `shard_map`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

State = TypeVar("State")


def varying_like(x: jax.Array, start: State) -> State:
    """`start` with the varying type of `x`: the initial state of a loop whose states depend on `x`.

    Inside `shard_map` the type of a value contains the mapped axes over which it varies, and the type of
    the state of a loop must not change. The values stay the same: both branches of the `where` are equal,
    and XLA removes it.
    """
    same = jnp.ravel(jnp.zeros_like(x))[0] == 0
    return jax.tree.map(lambda leaf: jnp.where(same, leaf, leaf), start)


def repeat(
    step: Callable[[State], tuple[State, jax.Array]],
    start: State,
    like: jax.Array,
    limit: int,
    done: jax.typing.ArrayLike = False,
) -> tuple[State, jax.Array]:
    """Repeats a step until it says that it was the last one.

    Args:
      step: `state -> (state, done)`.
      start: the first state.
      like: an array that every state depends on; see `varying_like`.
      limit: the largest number of steps.
      done: whether to take no step.

    Returns:
      The last state, and whether it was reached before the limit.
    """

    def advance(carry: tuple[State, jax.Array, jax.Array]) -> tuple[State, jax.Array, jax.Array]:
        state, _, count = carry
        return *step(state), count + 1

    first = (start, jnp.asarray(done), jnp.asarray(0, jnp.int32))
    state, done, _ = lax.while_loop(
        lambda carry: ~carry[1] & (carry[2] < limit), advance, varying_like(like, first)
    )
    return state, done
