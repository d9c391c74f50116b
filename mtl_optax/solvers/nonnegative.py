"""Nonnegative least squares in Gram form: the core on which the other solvers rest."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.solvers.loops import varying_like

REFINEMENTS = 2


class _Pivoting(NamedTuple):
    passive: jax.Array  # bool [T]: variables that may be positive
    solution: jax.Array  # [T]
    inverse: jax.Array  # [T, T], inverse factor of the set that was tried last
    fewest: jax.Array  # smallest number of violated conditions seen so far
    patience: jax.Array  # full exchanges still allowed without progress
    step: jax.Array
    done: jax.Array


def ridge(size: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Multiple of the identity that makes any unit-diagonal Gram matrix safely positive definite.

    It exceeds what rounding does to the eigenvalues of a Gram matrix. Iterative refinement takes its
    effect out again, except along directions that carry no gradient.
    """
    return jnp.asarray((64 + size) * jnp.finfo(dtype).eps, dtype)


def semidefinite(cosine: jax.Array) -> jax.Array:
    """The cosines over ``1 + s``, with the smallest ``s >= 0`` that lets :func:`ridge` do its work.

    Rounding in very long sums may give the cosines of dependent gradients eigenvalues further below 0
    than the ridge makes up for, and a factorisation would then be NaN. ``s`` is 0 where that has not
    happened, nearly always; to see that costs one factorisation.
    """
    size, dtype = cosine.shape[0], cosine.dtype
    # Half of it, so that rounding cannot tip another factorisation over.
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
    """``inverse(L)`` of the Cholesky factorisation ``L L'`` of a positive definite matrix.

    A batch of tiny triangular systems costs one call of LAPACK each. With the inverse, every further
    right-hand side is two fused products instead. Refinement takes out the digits that this loses.
    """
    factor = lax.linalg.cholesky(matrix, symmetrize_input=False)
    eye = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    return lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)


def masked_inverse_factor(matrix: jax.Array, passive: jax.Array) -> jax.Array:
    """:func:`inverse_factor` of ``matrix + ridge I`` on the passive rows and of the identity elsewhere."""
    size = matrix.shape[0]
    both = passive[:, None] & passive[None, :]
    diagonal = jnp.where(passive, ridge(size, matrix.dtype), jnp.ones((), matrix.dtype))
    shift = jnp.where(jnp.eye(size, dtype=bool), diagonal[:, None], 0)
    return inverse_factor(jnp.where(both, matrix, 0) + shift)


def factored_solve(inverse: jax.Array, right: jax.Array) -> jax.Array:
    """Solve with what :func:`inverse_factor` returned; ``right`` is ``[T]``."""
    half = product(inverse, right)
    return jnp.sum(inverse * half[:, None], axis=0)


def product(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Matrix times vector as a multiply and a reduction: full precision on every backend, and fusible."""
    return jnp.sum(matrix * vector[None, :], axis=1)


def exchange(
    passive: jax.Array, violated: jax.Array, fewest: jax.Array, patience: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of block principal pivoting.

    All violated variables change sides as long as their number falls; after three exchanges without
    progress only the last violated one does, the rule of Murty that cannot cycle.

    Returns:
        The new ``(passive, fewest, patience)``.
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
    tried: jax.Array  # bool [T], the passive set of the last step
    inverse: jax.Array  # [T, T], its inverse factor
    step: jax.Array
    done: jax.Array


def _descend(
    unit: jax.Array, target: jax.Array, usable: jax.Array, skip: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Passive set by the method of Lawson and Hanson: one variable at a time, always downhill.

    Slower than block pivoting, but it ends where that goes round in circles: on many gradients in few
    dimensions. There rounding decides, so each solution is refined before its signs are read. With
    ``skip`` it does nothing.

    Returns:
        The set, its inverse factor, and a feasible point on the set.
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
        room = state.solution / jnp.where(blocked, state.solution - goal, 1)
        room = jnp.where(blocked & (state.solution > goal), room, jnp.where(blocked, 0, jnp.inf))
        share = jnp.minimum(jnp.min(room), 1)
        solution = jnp.maximum(state.solution + share * (goal - state.solution), 0)
        kept = state.passive & ~(blocked & (room <= share))
        solution = jnp.where(kept, solution, 0)

        # Only at the optimum of its own set may another variable enter: the steepest one.
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
        tried=jnp.zeros_like(usable),
        inverse=jnp.eye(size, dtype=dtype),
        step=jnp.asarray(0, jnp.int32),
        done=skip,
    )
    start = varying_like(unit, start)
    end = lax.while_loop(lambda state: ~state.done & (state.step < 8 * size), step, start)
    return end.tried, end.inverse, end.solution


def nonnegative_least_squares(
    matrix: jax.Array, linear: jax.Array, active: jax.Array | None = None
) -> jax.Array:
    r"""Minimise :math:`\tfrac12 z^\top M z - q^\top z` over :math:`z \ge 0`.

    Block principal pivoting (Judice and Pires 1994; Kim and Park 2011): guess which variables are
    positive, solve for these, and move every variable whose sign condition fails to the other side. A few
    Cholesky factorisations suffice where a method that moves one variable at a time needs one for each.
    Where that does not settle, the method of Lawson and Hanson (1974) takes over.

    Args:
        matrix: ``M``, positive semidefinite ``[T, T]``; it may be singular.
        linear: ``q``, ``[T]``, in the range of ``M`` (always so for projections).
        active: variables that count, bool ``[T]``; the others get 0. All by default.

    Returns:
        ``z``, ``[T]``. When ``M`` is singular several ``z`` may be optimal; they all give the same
        combination of gradients. Variables whose diagonal entry is 0 get 0.
    """
    size, dtype = matrix.shape[0], matrix.dtype
    diagonal = jnp.diagonal(matrix)
    usable = diagonal > 0 if active is None else active & (diagonal > 0)
    scale = jnp.where(usable, lax.rsqrt(jnp.where(usable, diagonal, 1)), 0)
    both = usable[:, None] & usable[None, :]
    unit = jnp.where(both, matrix, 0) * scale[:, None] * scale[None, :]
    target = jnp.where(usable, linear, 0) * scale
    largest = jnp.max(jnp.abs(target))
    target = target / jnp.where(largest > 0, largest, 1)
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
    point: jax.Array  # [T], nonnegative, and never worse than where it began
    solution: jax.Array  # [T], refined
    blocked: jax.Array  # bool [T]: variables that refinement has made negative
    step: jax.Array


def _refine(
    unit: jax.Array,
    target: jax.Array,
    tolerance: Any,
    passive: jax.Array,
    inverse: jax.Array,
    point: jax.Array,
) -> jax.Array:
    """The solution on a passive set without what the ridge has done to it.

    Along a direction that carries no gradient, refinement is free to go anywhere, also out of the
    nonnegative numbers. The variable that gets there first is then not needed, and the others are solved
    without it, as in the method of Lawson and Hanson: set to 0 alone, it would leave them wrong.
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
        way = state.point - state.solution
        room = jnp.where(state.blocked, state.point / jnp.where(state.blocked, way, 1), jnp.inf)
        point = jnp.maximum(state.point - jnp.min(room) * way, 0)
        passive = state.passive & (index != jnp.argmin(room).astype(jnp.int32))
        return solve(passive, masked_inverse_factor(unit, passive), point, state.step + 1)

    start = varying_like(unit, solve(passive, inverse, point, jnp.asarray(0, jnp.int32)))
    limit = target.shape[0]
    return lax.while_loop(
        lambda state: jnp.any(state.blocked) & (state.step < limit), without_first, start
    ).solution
