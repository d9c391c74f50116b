"""`lagrangian` against reference numbers, and what is its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_optax as mtl


def test_lagrangian_meets_its_limit() -> None:
    """Minimise (w - 3)^2 subject to w^2 <= 1: the solution is w = 1 with the multiplier 2."""
    method = mtl.lagrangian(("cost", "goal"), limits={"cost": 1.0}, step_size=0.05, damping=1.0)

    def loss_fn(w: jax.Array, state: Any) -> Any:
        return mtl.weigh_losses({"goal": (w - 3) ** 2, "cost": w**2}, state, method)

    def step(carry: Any, _: Any) -> Any:
        w, state = carry
        grad, state = jax.grad(loss_fn, has_aux=True)(w, state)
        return (w - 0.02 * grad, state), None

    w = jnp.zeros(())
    (w, state), _ = jax.lax.scan(step, (w, method.init(w)), length=2000)
    np.testing.assert_allclose(w, 1.0, atol=1e-3)
    np.testing.assert_allclose(state.rule_state.multipliers[0], [2.0, 0.0], atol=1e-2)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"price": 1.0}, r"limits must name tasks of \['cost', 'goal'\]; found \['price'\]"),
        ([1.0], r"limits must have shape \(2,\), one entry per task .*; found \(1,\)"),
        ([1.0, 2.0], "at least one task must have no limit"),
    ],
)
def test_limits_that_cannot_be(limits: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mtl.lagrangian(("cost", "goal"), limits=limits, step_size=1.0)
