"""Linear programs over the probability simplex."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.loops import repeat


class _Tableau(NamedTuple):
    table: jax.Array  # one row per constraint, then the costs; columns x, slack variables, values
    basis: jax.Array  # the variable whose value each row holds
    feasible: jax.Array


def _pivot(state: _Tableau, row: jax.Array, column: jax.Array) -> _Tableau:
    """Solves the constraint `row` for the variable `column`, and inserts the result in all other rows."""
    index = jnp.arange(state.table.shape[0], dtype=jnp.int32)
    entry = state.table[row, column]
    solved = safe_divide(state.table[row], entry, where=entry != 0)
    rest = state.table - state.table[:, column][:, None] * solved[None, :]
    return state._replace(
        table=jnp.where(index[:, None] == row, solved[None, :], rest),
        basis=jnp.where(index[:-1] == row, column, state.basis),
    )


def maximize_on_simplex(
    gain: jax.Array, size: jax.Array, matrix: jax.Array, bound: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""Maximises :math:`c^\top x` over :math:`x \ge 0` with :math:`r^\top x = 1` and :math:`A x \ge b`.

    The dual simplex method: it starts at the best vertex without the constraints, and each pivot restores
    the most violated one, until none is.

    Args:
      gain: c, `[T]`.
      size: r, nonnegative `[T]`; a variable of size 0 stays 0.
      matrix: A, `[R, T]`.
      bound: b, `[R]`.

    Returns:
      `(x [T], feasible)`. If no x that satisfies all constraints was found, `feasible` is False.
    """
    (rows, variables), dtype = matrix.shape, matrix.dtype
    size_row = jnp.concatenate([size, jnp.zeros((rows,), dtype), jnp.ones((1,), dtype)])
    constraints = [jnp.where(size > 0, -matrix, 0), jnp.eye(rows, dtype=dtype), -bound[:, None]]
    costs = jnp.concatenate([jnp.where(size > 0, -gain, 0), jnp.zeros((rows + 1,), dtype)])
    table = jnp.concatenate([size_row[None], jnp.concatenate(constraints, axis=1), costs[None]])
    start = _Tableau(
        table=table,
        basis=variables - 1 + jnp.arange(rows + 1, dtype=jnp.int32),
        feasible=jnp.asarray(True),
    )
    best = jnp.argmax(safe_divide(gain, size, -jnp.inf)).astype(jnp.int32)
    start = _pivot(start, jnp.asarray(0, jnp.int32), best)
    rounding = 32 * jnp.finfo(dtype).eps

    def step(state: _Tableau) -> tuple[_Tableau, jax.Array]:
        values = state.table[:-1, -1]
        row = jnp.argmin(values).astype(jnp.int32)
        violated = values[row] < -rounding * jnp.max(jnp.abs(values))
        entries = state.table[row, :-1]
        usable = entries < -rounding * jnp.max(jnp.abs(entries))
        prices = safe_divide(jnp.maximum(state.table[-1, :-1], 0), -entries, jnp.inf, where=usable)
        column = jnp.argmin(prices).astype(jnp.int32)
        moves = violated & jnp.any(usable)
        moved = _pivot(state, row, column)
        state = jax.tree.map(lambda new, old: jnp.where(moves, new, old), moved, state)
        return state._replace(feasible=~violated | jnp.any(usable)), ~moves

    end, done = repeat(step, start, matrix, 8 * (rows + variables))
    held = end.basis[None, :] == jnp.arange(variables, dtype=jnp.int32)[:, None]
    x = jnp.sum(jnp.where(held, end.table[None, :-1, -1], 0), axis=1)
    return jnp.maximum(x, 0), done & end.feasible
