"""A problem with two parameters and two losses, on which papers draw the paths of their methods.

CAGrad (Liu et al., 2021, section 5) introduced it, and Nash-MTL (Navon et al., 2022, Figure 1) multiplied
the first loss by 0.1. `losses` is the formula of both official programs, `Cranial-XIX/CAGrad` (toy.py) and
`AvivNavon/nash-mtl` (experiments/toy/problem.py), and `STARTS` are Nash-MTL's five starting points.

EMTL's Figure 1 (Yuan and Zhang, 2023) leaves its losses to an appendix that is not in the paper that we
could read. That they are these is likely, not certain: the text speaks of a toy problem with five starting
points, losses of very different scale, a Pareto front, and an implementation on top of Nash-MTL's program.
"""

import jax
import jax.numpy as jnp
import numpy as np

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
SCALE = (0.1, 1.0)  # Nash-MTL's, of the two losses
CENTER, HEIGHT = 7.0, -8.0  # of the two bowls: at (7, -8) and (-7, -8)


def losses(position: jax.Array) -> jax.Array:
    """The two losses `[2]` at a point, unscaled."""
    x, y = position
    above, below = jnp.maximum(jnp.tanh(y / 2), 0), jnp.maximum(jnp.tanh(-y / 2), 0)

    def valley(distance: jax.Array) -> jax.Array:
        return jnp.log(jnp.maximum(jnp.abs(distance), 5e-6)) + 6

    def bowl(center: float) -> jax.Array:
        return ((x - center) ** 2 + 0.1 * (y - HEIGHT) ** 2) / 10 - 20

    first = above * valley((-x - 7) / 2 + jnp.tanh(y)) + below * bowl(CENTER)
    second = above * valley((3 - x) / 2 - jnp.tanh(y) + 2) + below * bowl(-CENTER)
    return jnp.stack([first, second])


def pareto_front(points: int = 1001) -> np.ndarray:
    """The unscaled losses of the Pareto set, `[points, 2]`, from the first loss's optimum to the second's.

    In the lower half each loss is tanh(-y / 2) times a bowl. The weights s and 1 - s of the losses put the
    optimum at x = 7 (2 s - 1), and at the y that minimises tanh(-y / 2) (k + (y + 8)^2 / 100), where k is
    the weighted mean of the bowls at this x and y = -8. A grid of y is enough: the losses are flat there.
    """
    share = np.linspace(1.0, 0.0, points)[:, None]
    k = CENTER**2 * 4 * share * (1 - share) / 10 - 20
    y = np.linspace(-12.0, -6.0, 6001)
    heights = y[np.argmin(np.tanh(-y / 2) * (k + (y - HEIGHT) ** 2 / 100), axis=1)]
    places = jnp.stack([CENTER * (2 * share[:, 0] - 1), heights], axis=1)
    return np.asarray(jax.vmap(losses)(places), float)
