"""`cosmos` and `pbi`: the derivatives of their objectives."""

import jax
import jax.numpy as jnp
import numpy as np
from golden_losses import simple

import mtl_optax as mtl


def test_preference_weights_are_the_derivatives_of_their_objectives():
    losses, r = jnp.array([0.7, 2.0, 1.1]), jnp.array([0.2, 0.5, 0.3])

    def cosmos(x):
        return r @ x - 0.8 * (r @ x) / (jnp.linalg.norm(r) * jnp.linalg.norm(x))

    def pbi(x):
        unit = r / jnp.linalg.norm(r)
        x = x - 0.1
        along = x @ unit
        return along + 2.0 * jnp.linalg.norm(x - along * unit)

    pairs = (
        (cosmos, mtl.cosmos(3, preference=r, lam=0.8)),
        (pbi, mtl.pbi(3, preference=r, theta=2.0, reference=0.1)),
    )
    for objective, method in pairs:
        np.testing.assert_allclose(
            simple(method, losses), jax.grad(objective)(losses), rtol=2e-5, atol=1e-6
        )


def test_preference_methods_where_the_objective_has_no_derivative():
    np.testing.assert_allclose(simple(mtl.cosmos(2), [0.0, 0.0]), 0.5)
    np.testing.assert_allclose(simple(mtl.pbi(3), [0.3, 0.3, 0.3]), 3**-0.5, rtol=1e-6)
