"""Nonnegative least squares in Gram form, on which other solvers are built."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.solvers.arithmetic import safe_divide
from mtl_optax.solvers.cosine import product
from mtl_optax.solvers.loops import repeat

REFINEMENTS = 2  # steps of iterative refinement after a solve


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


def refined_solve(
    matrix: jax.Array,
    inverse: jax.Array,
    right: jax.Array,
    passive: jax.Array,
    shift: jax.typing.ArrayLike = 0,
) -> jax.Array:
    """Solves `(matrix + shift) x = right` on the passive rows, with iterative refinement; x is 0 elsewhere.

    With a `shift` of 0, refinement removes the effect of the ridge in the inverse factor, except in the
    null space of the matrix.
    """
    solution = jnp.zeros_like(right)
    for _ in range(1 + REFINEMENTS):
        rest = right - product(matrix, solution) - shift * solution
        solution = solution + factored_solve(inverse, jnp.where(passive, rest, 0))
    return solution


# From the passive set and the last solution: the solution on this set, its slope, and whether it is exact.
_Solve: TypeAlias = Callable[
    [jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.typing.ArrayLike]
]


class _Pivoting(NamedTuple):
    passive: jax.Array  # bool [T]: variables that may be positive
    solution: jax.Array  # [T], on the passive set of the last step
    fewest: jax.Array  # smallest number of violated conditions so far
    patience: jax.Array  # full exchanges still allowed without progress


def _pivot(
    target: jax.Array, usable: jax.Array, solve: _Solve
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Block principal pivoting: exchanges every variable whose sign condition is violated.

    All violated variables change sides as long as their number decreases. After three exchanges without
    progress only the last violated variable does (Murty's rule, which cannot cycle).

    Args:
      target: `[T]`.
      usable: bool `[T]`, the variables that may be positive.
      solve: solves the system on a passive set.

    Returns:
      The passive set, the solution on it, and whether it is the solution of the problem.
    """
    size = target.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)
    tolerance = 8 * jnp.finfo(target.dtype).eps

    def step(state: _Pivoting) -> tuple[_Pivoting, jax.Array]:
        solution, slope, exact = solve(state.passive, state.solution)
        amount = jnp.max(jnp.abs(solution))
        too_small = state.passive & (solution < -tolerance * amount)
        downhill = usable & ~state.passive & (slope < -tolerance * (1 + amount))
        violated = too_small | downhill
        count = jnp.sum(violated, dtype=jnp.int32)
        progress = count < state.fewest
        last = index == jnp.max(jnp.where(violated, index, -1))
        moved = jnp.where(progress | (state.patience > 0), violated, last)
        new = _Pivoting(
            passive=state.passive ^ moved,
            solution=solution,
            fewest=jnp.minimum(count, state.fewest),
            patience=jnp.where(progress, 3, jnp.maximum(state.patience - 1, 0)),
        )
        return new, (count == 0) & exact

    start = _Pivoting(
        passive=target > 0,
        solution=jnp.zeros_like(target),
        fewest=jnp.asarray(size + 1, jnp.int32),
        patience=jnp.asarray(3, jnp.int32),
    )
    end, done = repeat(step, start, target, 20 + size // 2)
    return end.passive, end.solution, done


def _descend(
    unit: jax.Array,
    target: jax.Array,
    start: tuple[jax.Array, jax.Array],
    candidates: jax.Array,
    shift: jax.typing.ArrayLike,
    skip: jax.typing.ArrayLike = False,
) -> tuple[jax.Array, jax.Array]:
    """Active-set method of Lawson and Hanson: one variable at a time, with a decreasing objective.

    It moves to the solution on the passive set. If variables become negative on the way, it stops where
    the first one is 0 and removes that variable: setting it to 0 at the end would leave the others wrong.

    Args:
      unit: `[T, T]` with a unit diagonal.
      target: `[T]`.
      start: the first passive set, and a nonnegative point on it.
      candidates: the variables that may enter the passive set.
      shift: see `refined_solve`.
      skip: whether to return the start.

    Returns:
      The last passive set, and the point.
    """
    size, dtype = target.shape[0], target.dtype
    index = jnp.arange(size, dtype=jnp.int32)

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        passive, point = state
        inverse = masked_inverse_factor(unit, passive)
        goal = refined_solve(unit, inverse, target, passive, shift)
        blocked = passive & (goal <= 0)
        # The share of the step to `goal` after which each blocked variable is 0.
        otherwise = jnp.where(blocked, 0, jnp.inf)
        shares = safe_divide(point, point - goal, otherwise, where=blocked & (point > goal))
        share = jnp.minimum(jnp.min(shares), 1)
        kept = passive & ~(blocked & (shares <= share))
        point = jnp.where(kept, jnp.maximum(point + share * (goal - point), 0), 0)

        # Only at the optimum of the passive set may another variable enter: the steepest one.
        slope = jnp.where(candidates & ~kept, product(unit, point) - target, jnp.inf)
        steepest = jnp.argmin(slope).astype(jnp.int32)
        settled = ~jnp.any(blocked)
        optimal = slope[steepest] >= -8 * jnp.finfo(dtype).eps * (1 + jnp.max(point))
        enters = settled & ~optimal & (index == steepest)
        return (kept | enters, point), settled & optimal

    end, _ = repeat(step, start, unit, 8 * size, skip)
    return end


def nonnegative_least_squares(
    matrix: jax.Array, linear: jax.Array, active: jax.Array | None = None
) -> jax.Array:
    r"""Minimises :math:`\tfrac12 z^\top M z - q^\top z` over :math:`z \ge 0`.

    Block principal pivoting (Judice and Pires 1994; Kim and Park 2011) finds the positive variables (the
    passive set) by a few Cholesky factorisations; an exchange of single variables would take one per
    variable. It may cycle for many gradients in few dimensions. The method of Lawson and Hanson (1974),
    which always converges, then replaces it.

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

    def solve(passive: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array, bool]:
        inverse = masked_inverse_factor(unit, passive)
        solution = factored_solve(inverse, jnp.where(passive, target, 0))
        return solution, product(unit, solution) - target, True

    passive, solution, solved = _pivot(target, usable, solve)
    passive = passive & solved
    found = passive, jnp.where(passive, jnp.maximum(solution, 0), 0)
    # The ridge makes every solution unique; without it rounding could let variables enter for ever.
    found = _descend(unit, target, found, usable, ridge(size, dtype), solved)
    # Without the ridge, refinement is unconstrained in the null space, and variables may become negative.
    _, point = _descend(unit, target, found, jnp.zeros_like(usable), 0)
    return point * scale * largest


class _Conjugate(NamedTuple):
    solution: jax.Array  # [T]
    rest: jax.Array  # [T], the right-hand side minus the product with the solution
    direction: jax.Array  # [T], of the next step
    square: jax.Array  # of the norm of `rest`


def nonnegative_by_products(unit: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Minimises :math:`\tfrac12 z^\top M z - q^\top z` over :math:`z \ge 0`, without a factorisation.

    Block principal pivoting as in `nonnegative_least_squares`, with conjugate gradients for its systems.
    Under `vmap` over T vectors q, a step multiplies two matrices, by T^3 operations, where T Cholesky
    factorisations take T^4.

    Args:
      unit: M, positive semidefinite `[T, T]`; its diagonal is 1, or 0 for variables that do not count.
      target: q, `[T]`, in the range of M.

    Returns:
      z, `[T]`, and whether it is a solution: conjugate gradients may converge too slowly.
    """
    exact = (jnp.finfo(target.dtype).eps / 4) ** 2 * jnp.sum(target**2)

    def times(vector: jax.Array) -> jax.Array:
        return jnp.dot(vector, unit, precision=lax.Precision.HIGHEST)

    def solve(passive: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        solution = jnp.where(passive, last, 0)
        rest = jnp.where(passive, target - times(solution), 0)
        square = jnp.sum(rest**2)
        # Two more digits are enough to see which signs are wrong; the last passive set is solved exactly.
        enough = jnp.maximum(exact, 1e-4 * square)

        def step(state: _Conjugate) -> tuple[_Conjugate, jax.Array]:
            solution, rest, direction, square = state
            image = jnp.where(passive, times(direction), 0)
            length = safe_divide(square, jnp.sum(direction * image))
            rest = rest - length * image
            new = jnp.sum(rest**2)
            following = rest + safe_divide(new, square) * direction
            return _Conjugate(solution + length * direction, rest, following, new), new <= enough

        start = _Conjugate(solution, rest, rest, square)
        end, _ = repeat(step, start, target, target.size // 4, square <= enough)
        return end.solution, times(end.solution) - target, end.square <= exact

    _, solution, solved = _pivot(target, jnp.diagonal(unit) > 0, solve)
    return jnp.maximum(solution, 0), solved
