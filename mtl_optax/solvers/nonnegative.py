"""Nonnegative least squares in Gram form, on which other solvers are built."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.cosine import product
from mtl_optax.solvers.loops import varying_like

REFINEMENTS = 2  # steps of iterative refinement after a solve


class _Pivoting(NamedTuple):
    passive: jax.Array  # bool [T]: variables that may be positive
    solution: jax.Array  # [T]
    inverse: jax.Array  # [T, T], inverse factor of the last passive set
    fewest: jax.Array  # smallest number of violated conditions so far
    patience: jax.Array  # full exchanges still allowed without progress
    step: jax.Array
    done: jax.Array


def ridge(size: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Multiple of the identity that makes any unit-diagonal Gram matrix numerically positive definite.

    It exceeds the rounding errors of the eigenvalues of a Gram matrix. Iterative refinement removes its
    effect again, except in the null space.
    """
    return jnp.asarray((64 + size) * jnp.finfo(dtype).eps, dtype)


def semidefinite(cosine: jax.Array) -> jax.Array:
    """The cosines divided by `1 + s` off the diagonal, with s >= 0 large enough for `ridge` to suffice.

    After rounding in very long sums, the cosines of dependent gradients may have eigenvalues too negative
    for the ridge, and a factorisation would be NaN. Otherwise, which is nearly always, s is 0; the test
    costs one factorisation.
    """
    size, dtype = cosine.shape[0], cosine.dtype
    # Tested with half of the ridge, so that a later factorisation has a margin for its own rounding.
    margin = ridge(size, dtype) / 2
    eye = jnp.eye(size, dtype=dtype)

    def indefinite(shift: jax.Array) -> jax.Array:
        factor = lax.linalg.cholesky(cosine + (shift + margin) * eye, symmetrize_input=False)
        return ~jnp.isfinite(factor[-1, -1]) & (shift < size)

    def larger(shift: jax.Array) -> jax.Array:
        return jnp.maximum(2 * shift, margin)

    shift = lax.while_loop(indefinite, larger, jnp.zeros_like(cosine[0, 0]))
    return jnp.where(eye > 0, cosine, cosine / (1 + shift))


def inverse_factor(matrix: jax.Array) -> jax.Array:
    """The inverse of L, of the Cholesky factorisation `L L'` of a positive definite matrix.

    A triangular solve is one LAPACK call per system of a batch; with the inverse, a right-hand side costs
    two fused products instead. Iterative refinement restores the digits that this loses.
    """
    factor = lax.linalg.cholesky(matrix, symmetrize_input=False)
    eye = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    return lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)


def masked_inverse_factor(matrix: jax.Array, passive: jax.Array) -> jax.Array:
    """`inverse_factor` of the matrix plus its ridge on the passive rows, and of the identity elsewhere."""
    size = matrix.shape[0]
    both = passive[:, None] & passive[None, :]
    diagonal = jnp.where(passive, ridge(size, matrix.dtype), jnp.ones((), matrix.dtype))
    shift = jnp.where(jnp.eye(size, dtype=bool), diagonal[:, None], 0)
    return inverse_factor(jnp.where(both, matrix, 0) + shift)


def factored_solve(inverse: jax.Array, right: jax.Array) -> jax.Array:
    """Solves the system for the right-hand side `right`, `[T]`, given its `inverse_factor`."""
    half = product(inverse, right)
    return jnp.sum(inverse * half[:, None], axis=0)


def exchange(
    passive: jax.Array, violated: jax.Array, fewest: jax.Array, patience: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One exchange of block principal pivoting.

    All violated variables change sides as long as their number decreases. After three exchanges without
    progress only the last violated variable does (Murty's rule, which cannot cycle).

    Returns:
      The new `(passive, fewest, patience)`.
    """
    count = jnp.sum(violated, dtype=jnp.int32)
    progress = count < fewest
    whole_block = progress | (patience > 0)
    index = jnp.arange(passive.shape[0], dtype=jnp.int32)
    last = jnp.max(jnp.where(violated, index, -1))
    moved = jnp.where(whole_block, violated, index == last)
    patience = jnp.where(progress, 3, jnp.maximum(patience - 1, 0))
    return passive ^ moved, jnp.minimum(count, fewest), patience


class _Descent(NamedTuple):
    passive: jax.Array  # bool [T]
    solution: jax.Array  # [T], always feasible
    last: jax.Array  # bool [T], the passive set of the last step
    inverse: jax.Array  # [T, T], the inverse factor of that set
    step: jax.Array
    done: jax.Array


def _descend(
    unit: jax.Array, target: jax.Array, usable: jax.Array, skip: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Active-set method of Lawson and Hanson: one variable at a time, with a decreasing objective.

    It is slower than block pivoting, but it also converges if that cycles, as for many gradients in few
    dimensions. Rounding then decides signs, so each solution is refined first. It does nothing if `skip`
    is True.

    Returns:
      The passive set, its inverse factor, and a feasible point on the set.
    """
    size, dtype = target.shape[0], target.dtype
    tolerance = 8 * jnp.finfo(dtype).eps
    index = jnp.arange(size, dtype=jnp.int32)

    def step(state: _Descent) -> _Descent:
        inverse = masked_inverse_factor(unit, state.passive)
        goal = jnp.zeros_like(target)
        for _ in range(1 + REFINEMENTS):
            left = target - product(unit, goal) - ridge(size, dtype) * goal
            goal = goal + factored_solve(inverse, jnp.where(state.passive, left, 0))
        blocked = state.passive & (goal <= 0)
        # The share of the step to `goal` after which each blocked variable is 0.
        shares = safe_divide(
            state.solution,
            state.solution - goal,
            jnp.where(blocked, 0, jnp.inf),
            where=blocked & (state.solution > goal),
        )
        share = jnp.minimum(jnp.min(shares), 1)
        solution = jnp.maximum(state.solution + share * (goal - state.solution), 0)
        kept = state.passive & ~(blocked & (shares <= share))
        solution = jnp.where(kept, solution, 0)

        # Only at the optimum of the passive set may another variable enter: the steepest one.
        slope = jnp.where(usable & ~kept, product(unit, solution) - target, jnp.inf)
        steepest = jnp.argmin(slope).astype(jnp.int32)
        settled = ~jnp.any(blocked)
        optimal = slope[steepest] >= -tolerance * (1 + jnp.max(solution))
        enters = settled & ~optimal & (index == steepest)
        return _Descent(
            kept | enters, solution, state.passive, inverse, state.step + 1, settled & optimal
        )

    start = _Descent(
        passive=jnp.zeros_like(usable),
        solution=jnp.zeros_like(target),
        last=jnp.zeros_like(usable),
        inverse=jnp.eye(size, dtype=dtype),
        step=jnp.asarray(0, jnp.int32),
        done=skip,
    )
    start = varying_like(unit, start)
    end = lax.while_loop(lambda state: ~state.done & (state.step < 8 * size), step, start)
    return end.last, end.inverse, end.solution


def nonnegative_least_squares(
    matrix: jax.Array, linear: jax.Array, active: jax.Array | None = None
) -> jax.Array:
    r"""Minimises :math:`\tfrac12 z^\top M z - q^\top z` over :math:`z \ge 0`.

    Block principal pivoting (Judice and Pires 1994; Kim and Park 2011): solves for the variables assumed
    positive (the passive set) and exchanges every variable whose sign condition is violated. This takes a
    few Cholesky factorisations; an exchange of single variables would take one per variable. If it does
    not converge, the method of Lawson and Hanson (1974) is used.

    Args:
      matrix: M, positive semidefinite `[T, T]`; it may be singular.
      linear: q, `[T]`, in the range of M (always true for projections).
      active: variables that count, bool `[T]`; the others get 0. All by default.

    Returns:
      z, `[T]`. If M is singular, several z may be optimal; they all give the same combination of
      gradients. Variables whose diagonal entry is 0 get 0.
    """
    size, dtype = matrix.shape[0], matrix.dtype
    diagonal = jnp.diagonal(matrix)
    usable = diagonal > 0 if active is None else active & (diagonal > 0)
    scale = jnp.where(usable, lax.rsqrt(jnp.where(usable, diagonal, 1)), 0)
    both = usable[:, None] & usable[None, :]
    unit = jnp.where(both, matrix, 0) * scale[:, None] * scale[None, :]
    target = jnp.where(usable, linear, 0) * scale
    largest = jnp.max(jnp.abs(target))
    target = safe_divide(target, largest)
    tolerance = 8 * jnp.finfo(dtype).eps

    def step(state: _Pivoting) -> _Pivoting:
        inverse = masked_inverse_factor(unit, state.passive)
        solution = factored_solve(inverse, jnp.where(state.passive, target, 0))
        slope = product(unit, solution) - target
        amount = jnp.max(jnp.abs(solution))
        too_small = state.passive & (solution < -tolerance * amount)
        downhill = usable & ~state.passive & (slope < -tolerance * (1 + amount))
        violated = too_small | downhill
        passive, fewest, patience = exchange(state.passive, violated, state.fewest, state.patience)
        return _Pivoting(
            passive, solution, inverse, fewest, patience, state.step + 1, ~jnp.any(violated)
        )

    start = _Pivoting(
        passive=target > 0,
        solution=jnp.zeros_like(target),
        inverse=jnp.eye(size, dtype=dtype),
        fewest=jnp.asarray(size + 1, jnp.int32),
        patience=jnp.asarray(3, jnp.int32),
        step=jnp.asarray(0, jnp.int32),
        done=jnp.asarray(False),
    )
    limit = 20 + size // 2
    start = varying_like(unit, start)
    end = lax.while_loop(lambda state: ~state.done & (state.step < limit), step, start)

    slow_passive, slow_inverse, slow_solution = _descend(unit, target, usable, end.done)
    passive = jnp.where(end.done, end.passive, slow_passive)
    inverse = jnp.where(end.done, end.inverse, slow_inverse)
    point = jnp.where(end.done, jnp.maximum(end.solution, 0), slow_solution)
    solution = _refine(unit, target, tolerance, passive, inverse, point)
    return jnp.maximum(solution, 0) * scale * largest


class _Refining(NamedTuple):
    passive: jax.Array  # bool [T]
    point: jax.Array  # [T], nonnegative, with an objective never above that of the first point
    solution: jax.Array  # [T], refined
    blocked: jax.Array  # bool [T]: variables that became negative by refinement
    step: jax.Array


def _refine(
    unit: jax.Array,
    target: jax.Array,
    tolerance: Any,
    passive: jax.Array,
    inverse: jax.Array,
    point: jax.Array,
) -> jax.Array:
    """The solution on a passive set without the effect of the ridge.

    In the null space of the matrix, refinement is unconstrained and may make variables negative. The
    first variable to reach 0 is then not needed: it is removed and the others are solved again, as in the
    method of Lawson and Hanson. Setting it to 0 would leave the others wrong.
    """
    index = jnp.arange(target.shape[0], dtype=jnp.int32)

    def solve(
        passive: jax.Array, inverse: jax.Array, point: jax.Array, step: jax.Array
    ) -> _Refining:
        solution = factored_solve(inverse, jnp.where(passive, target, 0))
        for _ in range(REFINEMENTS):
            rest = jnp.where(passive, target - product(unit, solution), 0)
            solution = solution + factored_solve(inverse, rest)
        blocked = passive & (solution < -tolerance * jnp.max(jnp.abs(solution)))
        return _Refining(passive, jnp.where(passive, point, 0), solution, blocked, step)

    def without_first(state: _Refining) -> _Refining:
        decrease = state.point - state.solution
        shares = safe_divide(state.point, decrease, jnp.inf, where=state.blocked)
        point = jnp.maximum(state.point - jnp.min(shares) * decrease, 0)
        passive = state.passive & (index != jnp.argmin(shares).astype(jnp.int32))
        return solve(passive, masked_inverse_factor(unit, passive), point, state.step + 1)

    start = varying_like(unit, solve(passive, inverse, point, jnp.asarray(0, jnp.int32)))
    limit = target.shape[0]
    return lax.while_loop(
        lambda state: jnp.any(state.blocked) & (state.step < limit), without_first, start
    ).solution
