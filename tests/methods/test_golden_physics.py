"""The weightings of physics-informed training and of constraints, against their reference numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import error, load

import mtl_optax as mtl

WEIGHT_CASES = {
    "softadapt": load("loss/softadapt"),
    "relobralo": load("loss/relobralo"),
    "inverse_norm": load("loss/inverse_norm"),
    "ntk": load("loss/ntk"),
    "lagrangian": load("loss/lagrangian"),
}
# What the reference numbers call by the letter of a paper.
ARGUMENTS = {"alpha": "ema_decay"}


def updates_of(method: Any, gradients: Any, **extra: Any) -> tuple[np.ndarray, Any]:
    """The updates and states of one sequence of steps `[K, T, n]`, through the public `update`."""

    def step(state: Any, inputs: Any) -> Any:
        grads, given = inputs
        update, state = method.update(grads, state, **given)
        return state, (update, state)

    start = method.init(jnp.zeros(gradients.shape[2]))
    _, (updates, states) = jax.jit(lambda xs: jax.lax.scan(step, start, xs))((gradients, extra))
    return np.asarray(updates), states


def unit_gradients(case: Any, lengths: Any = 1.0) -> jax.Array:
    """Orthogonal gradients of given lengths: an update divided by the lengths is the weights."""
    steps = len(case["outputs"]["weights"])
    lengths = jnp.broadcast_to(jnp.asarray(lengths), (steps, case["T"]))
    return lengths[:, :, None] * jnp.eye(case["T"])[None]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", WEIGHT_CASES)
def test_weights(name: str) -> None:
    for case in WEIGHT_CASES[name]:
        named = {ARGUMENTS.get(key, key): x for key, x in case["hyperparameters"].items()}
        method = mtl.METHODS[name].factory(case["T"], **named)
        lengths = jnp.asarray(case.get("grad_norms", 1.0))
        given = {
            name: jnp.asarray(case[name]) for name in ("losses", "noise", "traces") if name in case
        }
        updates, states = updates_of(method, unit_gradients(case, lengths), **given)
        weights = updates / np.broadcast_to(lengths, updates.shape)
        assert error(weights, case["outputs"]["weights"]) <= 1e-12, case["name"]
        if "multipliers" in case["outputs"]:
            found = states.rule_state.multipliers[:, 0]
            assert error(found, case["outputs"]["multipliers"]) <= 1e-12, case["name"]


@pytest.mark.usefixtures("x64")
def test_lr_annealing() -> None:
    for case in load("gradient/lr_annealing"):
        method = mtl.lr_annealing(case["T"], **case["hyperparameters"])
        updates, states = updates_of(method, jnp.asarray(case["G"]))
        assert error(updates, case["outputs"]["update"]) <= 1e-12, case["name"]
        assert error(states.weights[:, 0], case["outputs"]["weights"]) <= 1e-12, case["name"]


@pytest.mark.usefixtures("x64")
def test_jaxpi_in_ten_lines() -> None:
    """`update_every=k` on the losses' own function: weights every k-th step, one backward pass between."""
    x = jax.random.normal(jax.random.key(0), (9, 3))

    def loss_fn(w: jax.Array) -> dict[str, jax.Array]:
        return {"res": jnp.mean((jnp.tanh(x @ w) - 1) ** 2), "ics": 50 * jnp.mean((w - 2) ** 2)}

    method = mtl.inverse_norm(("res", "ics"), eps=1e-5, update_every=3)
    step = jax.jit(mtl.weighted_value_and_grad(loss_fn, method))
    w, expected_w, weights = jnp.zeros(3), jnp.zeros(3), {"res": 1.0, "ics": 1.0}
    state = method.init(w)
    for k in range(7):
        _, (update, state) = step(w, state)
        grads = jax.jacrev(loss_fn)(expected_w)
        if k % 3 == 0:
            norms = {name: np.linalg.norm(g) for name, g in grads.items()}
            mean = np.mean(list(norms.values()))
            weights = {n: 0.9 * weights[n] + 0.1 * mean / (norms[n] + 1e-5 * mean) for n in norms}
        expected = sum(weights[name] * g for name, g in grads.items())
        np.testing.assert_allclose(update, expected, rtol=1e-12)
        w, expected_w = w - 0.01 * update, expected_w - 0.01 * expected


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
