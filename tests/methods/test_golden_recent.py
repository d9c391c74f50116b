"""Methods of 2023 to 2025, against the numbers of their authors' programs or of exact arithmetic.

The hyperparameters of a case are the arguments of the factory.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_cases import error, load

import mtl_optax as mtl

LOSS_CASES = {
    "igb": load("loss/igb"),
    "ldc_mtl": load("loss/ldc_mtl"),
    "uw_so": load("loss/uw_so"),
}
OPTIMIZERS = {"adam": optax.adam, "sgd": optax.sgd}
SOLVER_CASES = {"epo": load("gradient/epo")}
GRADIENT_CASES = {
    "gradcraft": load("gradient/gradcraft"),
    "scale_by_pub": load("gradient/pub"),
}


def updates_of(method: Any, gradients: Any, **extra: Any) -> tuple[np.ndarray, Any]:
    """The updates and states of a sequence of steps `[K, T, n]`."""

    def step(state: Any, inputs: Any) -> Any:
        grads, given = inputs
        update, state = method.update(grads, state, **given)
        return state, (update, state)

    start = method.init(jnp.zeros(gradients.shape[2]))
    _, (updates, states) = jax.jit(lambda xs: jax.lax.scan(step, start, xs))((gradients, extra))
    return np.asarray(updates), states


def cases(groups: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, case, id=f"{name} {case['name']}")
        for name, group in groups.items()
        for case in group
    ]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "case"), cases(LOSS_CASES))
def test_weights_of_losses(name: str, case: Any) -> None:
    losses = jnp.asarray(case["losses"])
    arguments = dict(case["hyperparameters"])
    if "optimizer" in case:
        arguments["optimizer"] = OPTIMIZERS[case["optimizer"]](case["lr"])
    method = mtl.METHODS[name].factory(case["T"], **arguments)
    unit = jnp.broadcast_to(jnp.eye(case["T"]), (*losses.shape, case["T"]))
    weights, states = updates_of(method, unit, losses=losses)
    for k, expected in enumerate(case["outputs"]["weights"]):
        assert error(weights[k], expected) <= 1e-12
    if "values_before" in case["outputs"]:
        values = states.rule_state.values[:-1, 0]
        assert error(values, case["outputs"]["values_before"][1:]) <= 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "case"), cases(GRADIENT_CASES))
def test_updates(name: str, case: Any) -> None:
    gradients = jnp.asarray([step["G"] for step in case["steps"]])
    method = mtl.METHODS[name].factory(gradients.shape[1], **case["hyperparameters"])
    updates, _ = updates_of(method, gradients)
    for k, step in enumerate(case["steps"]):
        assert error(updates[k], step["update"]) <= 1e-10


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "case"), cases(SOLVER_CASES))
def test_updates_of_a_program_with_a_solver(name: str, case: Any) -> None:
    gradients, losses = jnp.asarray(case["G"]), jnp.asarray(case["losses"])
    method = mtl.METHODS[name].factory(len(losses), **case["hyperparameters"])
    updates, states = updates_of(method, gradients[None], losses=losses[None])
    # The solver of the reference stops at a tolerance of 1e-7.
    largest = float(jnp.max(jnp.linalg.norm(gradients, axis=1)))
    np.testing.assert_allclose(updates[0], case["outputs"]["update"], rtol=0, atol=1e-6 * largest)
    assert int(states.rule_state.fallback_count[0, 0]) == 0
