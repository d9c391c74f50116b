"""Eigenvalues and pseudo-inverses of Gram matrices, with one tolerance for eigenvalues that are zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtl_optax.solvers.arithmetic import safe_divide


def eigenvalue_tolerance(size: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Eigenvalues below this multiple of the largest one count as zero.

    The rounding errors of a Gram matrix are of this size, so smaller eigenvalues hold no information. For
    singular values, the square roots, the limit is about 3e-3 of the largest one in float32 and 6e-8 in
    float64.
    """
    return jnp.asarray(16 * max(size, 4) * jnp.finfo(dtype).eps, dtype)


def kept_eigenpairs(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eigenvalues (ascending), eigenvectors, and which eigenvalues are not numerically zero."""
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    largest = jnp.max(values)
    tolerance = eigenvalue_tolerance(matrix.shape[0], matrix.dtype)
    return values, vectors, (values > tolerance * largest) & (largest > 0)


def rotate(vectors: jax.Array, coefficients: jax.Array, right: jax.Array) -> jax.Array:
    """`V diag(coefficients) V' right` for a vector `right`."""
    inside = jnp.sum(vectors * right[:, None], axis=0)
    return jnp.sum(vectors * (coefficients * inside)[None, :], axis=1)


def pseudo_solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """The pseudo-inverse of a positive semidefinite matrix, times a vector."""
    values, vectors, kept = kept_eigenpairs(matrix)
    return rotate(vectors, safe_divide(1, values, where=kept), right)
