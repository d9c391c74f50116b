"""`ntk` against reference numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from golden_cases import error

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
def test_ntk_trace_is_the_squared_jacobian() -> None:
    def residuals(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["w"]) @ params["v"]

    keys = jax.random.split(jax.random.key(1), 3)
    params = {"w": jax.random.normal(keys[0], (2, 5)), "v": jax.random.normal(keys[1], (5,))}
    x = jax.random.normal(keys[2], (20, 2))
    jacobian = jax.jacrev(residuals)(params, x)
    exact = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(jacobian))
    assert error(mtl.ntk_trace(residuals, params, x), exact) <= 1e-12
    estimate = mtl.ntk_trace(residuals, params, x, num_samples=400, key=jax.random.key(2))
    assert error(estimate, exact) < 0.2
    with pytest.raises(ValueError, match="give a random key"):
        mtl.ntk_trace(residuals, params, x, num_samples=4)
