"""Three partial differential equations with known solutions, as residuals of a network u(x, y)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

Network = Callable[[jax.Array], jax.Array]  # points [n, 2] to u [n]
Residuals = dict[str, jax.Array]  # by name; the loss of each is its mean square


@dataclass(frozen=True)
class Problem:
    """A problem on a rectangle.

    Attributes:
      name: for the table.
      terms: the names of the residuals.
      low, high: corners of the rectangle; for problems in time the second coordinate is the time.
      residuals: `(u, points of the interior [n, 2], points of the boundary [4, m, 2])` to the residuals
        of the equation and of the conditions on the boundary.
      solution: `points [n, 2] -> u`, computed in float64 by NumPy.
    """

    name: str
    terms: tuple[str, ...]
    low: tuple[float, float]
    high: tuple[float, float]
    residuals: Callable[[Network, jax.Array, jax.Array], Residuals]
    solution: Callable[[np.ndarray], np.ndarray]

    def losses(self, u: Network, interior: jax.Array, boundary: jax.Array) -> dict[str, jax.Array]:
        """The mean squares of the residuals."""
        found = self.residuals(u, interior, boundary)
        return {name: jnp.mean(values * values) for name, values in found.items()}

    def draw(self, key: jax.Array, interior: int, edge: int) -> tuple[jax.Array, jax.Array]:
        """Uniform points of the interior `[interior, 2]` and of the four edges `[4, edge, 2]`."""
        inner, outer = jax.random.split(key)
        unit = jax.random.uniform(outer, (4, edge))
        zero, one = jnp.zeros(edge), jnp.ones(edge)
        # Left, right (first coordinate fixed), bottom, top (second coordinate fixed).
        edges = [(zero, unit[0]), (one, unit[1]), (unit[2], zero), (unit[3], one)]
        boundary = jnp.stack([jnp.stack(pair, axis=-1) for pair in edges])
        return self.place(jax.random.uniform(inner, (interior, 2))), self.place(boundary)

    def place(self, unit: jax.Array) -> jax.Array:
        """Points of the unit square `[..., 2]` on the rectangle."""
        low, high = self._corners(unit)
        return low + (high - low) * unit

    def scale(self, points: jax.Array) -> jax.Array:
        """Points of the rectangle `[..., 2]` on the square from -1 to 1, for the network's input."""
        low, high = self._corners(points)
        return 2 * (points - low) / (high - low) - 1

    def _corners(self, points: jax.Array) -> Iterator[jax.Array]:
        corners = (jnp.asarray(corner, points.dtype) for corner in (self.low, self.high))
        return (jnp.broadcast_to(corner, points.shape) for corner in corners)

    def grid(self, size: int) -> np.ndarray:
        """A regular grid `[size * size, 2]` over the rectangle."""
        axes = [np.linspace(a, b, size) for a, b in zip(self.low, self.high, strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def _derivatives(u: Network, points: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    """U and its first and second derivatives along one axis, `[n]` each.

    Forward over forward: on a CPU an eighth of the time of `jax.hessian` at every point.
    """
    along = jnp.zeros_like(points).at[:, axis].set(1)
    (value, first), (_, second) = jax.jvp(
        lambda points: jax.jvp(u, (points,), (along,)), (points,), (along,)
    )
    return value, first, second


# --- u_xx + u_yy + u = q with u = sin(pi x) sin(4 pi y), 0 on the boundary


def _helmholtz(u: Network, interior: jax.Array, boundary: jax.Array) -> Residuals:
    a, b = jnp.pi, 4 * jnp.pi
    value, _, u_xx = _derivatives(u, interior, 0)
    *_, u_yy = _derivatives(u, interior, 1)
    source = (1 - a**2 - b**2) * jnp.sin(a * interior[:, 0]) * jnp.sin(b * interior[:, 1])
    return {"boundary": u(boundary.reshape(-1, 2)), "equation": u_xx + u_yy + value - source}


def _helmholtz_solution(points: np.ndarray) -> np.ndarray:
    return np.sin(np.pi * points[:, 0]) * np.sin(4 * np.pi * points[:, 1])


# --- u_t + u u_x = nu u_xx with u(x, 0) = -sin(pi x)

_VISCOSITY = 0.01 / np.pi


def _burgers(u: Network, interior: jax.Array, boundary: jax.Array) -> Residuals:
    value, u_x, u_xx = _derivatives(u, interior, 0)
    _, u_t, _ = _derivatives(u, interior, 1)
    start = boundary[2]
    return {
        "boundary": u(boundary[:2].reshape(-1, 2)),
        "equation": u_t + value * u_x - _VISCOSITY * u_xx,
        "initial": u(start) + jnp.sin(jnp.pi * start[:, 0]),
    }


def _burgers_solution(points: np.ndarray) -> np.ndarray:
    """The Cole-Hopf transformation, its two integrals by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    x, t = points[:, :1], points[:, 1:]
    shifted = x - np.sqrt(4 * _VISCOSITY * t) * nodes
    exponent = -np.cos(np.pi * shifted) / (2 * np.pi * _VISCOSITY)
    kernel = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -(kernel * np.sin(np.pi * shifted)).sum(1) / kernel.sum(1)


# --- stiff: u_t + c u_x = 0, periodic in x, with u(x, 0) = sin(x)

_SPEED = 10.0


def _advection(u: Network, interior: jax.Array, boundary: jax.Array) -> Residuals:
    _, u_x, _ = _derivatives(u, interior, 0)
    _, u_t, _ = _derivatives(u, interior, 1)
    left, start = boundary[0], boundary[2]
    right = left + jnp.array([[2 * jnp.pi, 0.0]])
    return {
        "boundary": u(left) - u(right),
        "equation": u_t + _SPEED * u_x,
        "initial": u(start) - jnp.sin(start[:, 0]),
    }


def _advection_solution(points: np.ndarray) -> np.ndarray:
    return np.sin(points[:, 0] - _SPEED * points[:, 1])


BOUNDARY = ("boundary", "equation")
IN_TIME = (*BOUNDARY, "initial")
PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("helmholtz", BOUNDARY, (-1, -1), (1, 1), _helmholtz, _helmholtz_solution),
        Problem("burgers", IN_TIME, (-1, 0), (1, 1), _burgers, _burgers_solution),
        Problem("advection", IN_TIME, (0, 0), (2 * np.pi, 1), _advection, _advection_solution),
    )
}
