"""Three partial differential equations with known solutions, as losses of a network u(x, y)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

Network = Callable[[jax.Array], jax.Array]  # a point [2] to u


@dataclass(frozen=True)
class Problem:
    """A problem on a rectangle.

    Attributes:
      name: for the table.
      low, high: corners of the rectangle; for problems in time the second coordinate is the time.
      losses: `(u, points of the interior, points of the boundary [4, n, 2]) -> losses by name`.
      solution: `points [n, 2] -> u`, computed in float64 by NumPy.
    """

    name: str
    low: tuple[float, float]
    high: tuple[float, float]
    losses: Callable[[Network, jax.Array, jax.Array], dict[str, jax.Array]]
    solution: Callable[[np.ndarray], np.ndarray]

    def draw(self, key: jax.Array, interior: int, edge: int) -> tuple[jax.Array, jax.Array]:
        """Uniform points of the interior `[interior, 2]` and of the four edges `[4, edge, 2]`."""
        inner, outer = jax.random.split(key)
        low, high = jnp.asarray(self.low), jnp.asarray(self.high)
        unit = jax.random.uniform(outer, (4, edge))
        zero, one = jnp.zeros(edge), jnp.ones(edge)
        # Left, right (first coordinate fixed), bottom, top (second coordinate fixed).
        edges = [(zero, unit[0]), (one, unit[1]), (unit[2], zero), (unit[3], one)]
        boundary = jnp.stack([jnp.stack(pair, axis=-1) for pair in edges])
        points = jax.random.uniform(inner, (interior, 2))
        place = jnp.vectorize(lambda p: low + (high - low) * p, signature="(d)->(d)")
        return place(points), place(boundary)

    def grid(self, size: int) -> np.ndarray:
        """A regular grid `[size * size, 2]` over the rectangle."""
        axes = [np.linspace(a, b, size) for a, b in zip(self.low, self.high, strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def _mean_square(values: jax.Array) -> jax.Array:
    return jnp.mean(values * values)


# Helmholtz: u_xx + u_yy + u = q with u = sin(pi x) sin(4 pi y), 0 on the boundary.

_WAVES = (1.0, 4.0)


def _helmholtz_solution(points: np.ndarray) -> np.ndarray:
    a, b = _WAVES
    return np.sin(a * np.pi * points[:, 0]) * np.sin(b * np.pi * points[:, 1])


def _helmholtz(u: Network, interior: jax.Array, boundary: jax.Array) -> dict[str, jax.Array]:
    a, b = (wave * jnp.pi for wave in _WAVES)

    def residual(point: jax.Array) -> jax.Array:
        source = (1 - a**2 - b**2) * jnp.sin(a * point[0]) * jnp.sin(b * point[1])
        return jnp.trace(jax.hessian(u)(point)) + u(point) - source

    return {
        "boundary": _mean_square(jax.vmap(u)(boundary.reshape(-1, 2))),
        "equation": _mean_square(jax.vmap(residual)(interior)),
    }


# Burgers: u_t + u u_x = nu u_xx with u(x, 0) = -sin(pi x); the Cole-Hopf transformation gives u.

_VISCOSITY = 0.01 / np.pi


def _burgers_solution(points: np.ndarray) -> np.ndarray:
    # Gauss-Hermite quadrature of the two integrals of the transformation.
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    x, t = points[:, :1], points[:, 1:]
    shifted = x - np.sqrt(4 * _VISCOSITY * t) * nodes
    exponent = -np.cos(np.pi * shifted) / (2 * np.pi * _VISCOSITY)
    kernel = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -(kernel * np.sin(np.pi * shifted)).sum(1) / kernel.sum(1)


def _burgers(u: Network, interior: jax.Array, boundary: jax.Array) -> dict[str, jax.Array]:
    def residual(point: jax.Array) -> jax.Array:
        gradient = jax.grad(u)(point)
        along_x = jnp.array([1.0, 0.0])
        second = jax.jvp(lambda p: jax.grad(u)(p)[0], (point,), (along_x,))[1]
        return gradient[1] + u(point) * gradient[0] - _VISCOSITY * second

    start = boundary[2]
    return {
        "boundary": _mean_square(jax.vmap(u)(boundary[:2].reshape(-1, 2))),
        "equation": _mean_square(jax.vmap(residual)(interior)),
        "initial": _mean_square(jax.vmap(u)(start) + jnp.sin(jnp.pi * start[:, 0])),
    }


# Stiff advection: u_t + c u_x = 0, periodic in x, with u(x, 0) = sin(x).

_SPEED = 10.0


def _advection_solution(points: np.ndarray) -> np.ndarray:
    return np.sin(points[:, 0] - _SPEED * points[:, 1])


def _advection(u: Network, interior: jax.Array, boundary: jax.Array) -> dict[str, jax.Array]:
    def residual(point: jax.Array) -> jax.Array:
        gradient = jax.grad(u)(point)
        return gradient[1] + _SPEED * gradient[0]

    left, start = boundary[0], boundary[2]
    right = left + jnp.array([[2 * jnp.pi, 0.0]])
    return {
        "boundary": _mean_square(jax.vmap(u)(left) - jax.vmap(u)(right)),
        "equation": _mean_square(jax.vmap(residual)(interior)),
        "initial": _mean_square(jax.vmap(u)(start) - jnp.sin(start[:, 0])),
    }


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("helmholtz", (-1.0, -1.0), (1.0, 1.0), _helmholtz, _helmholtz_solution),
        Problem("burgers", (-1.0, 0.0), (1.0, 1.0), _burgers, _burgers_solution),
        Problem("advection", (0.0, 0.0), (2 * np.pi, 1.0), _advection, _advection_solution),
    )
}
