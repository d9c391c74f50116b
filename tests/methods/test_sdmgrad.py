"""`sdmgrad` against reference numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import (
    error,
    load,
    pad_sequences,
)
from golden_sequences import each_step, pad_steps, products, shares

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("run", ["official_function", "libmtl", "official_training_class_aliased"])
def test_golden(run: str) -> None:
    """The official numbers exactly: its 1e-4 under the root only rescales the steps on w."""
    cases = load("gradient/sdmgrad")
    aliased = run.endswith("aliased")
    rate = 5.0 if run == "libmtl" else 10.0
    sample = "xi_prime" if aliased else "zeta"
    gradients, active = pad_sequences([[s[sample] for s in c["steps"]] for c in cases])
    size = gradients.shape[2]

    def gram(step: Any) -> np.ndarray:
        left = step["xi_prime" if aliased else "xi"]
        return products(left, step["xi_prime"], size)

    def step_size(step: Any) -> float:
        tasks = len(step["xi"])
        diagonal = np.diagonal(gram(step))[:tasks]
        if run == "libmtl":
            return rate  # adds nothing under the root
        theirs = np.sqrt(diagonal + 1e-4).mean()
        ours = np.sqrt(np.maximum(diagonal, 0)).mean()
        return rate * (ours / theirs) ** 2

    matrices = pad_steps(cases, gram, (size, size))
    rates = pad_steps(cases, step_size, ())

    def one(sequence: Any, active: Any, matrices: Any, rates: Any) -> Any:
        start = mtl.sdmgrad(size).init(jnp.zeros(sequence.shape[2]))

        def step(state: Any, inputs: Any) -> Any:
            g, matrix, rate = inputs
            transformation = mtl.sdmgrad(size, step_size=rate)
            extra = {} if aliased else {"gram": matrix}
            update, state = transformation.update(g, state, active=active, **extra)
            return state, (update, state.rule_state.simplex_weights[0])

        return jax.lax.scan(step, start, (sequence, matrices, rates))[1]

    updates, weights = jax.jit(jax.vmap(one))(gradients, active, matrices, rates)
    kind = "aliased" if aliased else run

    def steady(step: Any) -> bool:
        """Whether the trajectory has not yet amplified noise of 1e-12 to more than the tolerance."""
        return step["sensitivity_to_1e-12_relative_input_noise"][kind] <= 1e-9

    for i, k, step in each_step(cases, steady):
        tasks, n = len(step["xi"]), len(step["xi"][0])
        entry = step[run]
        want = np.asarray(entry["update_xT"]) / tasks if aliased else entry["update"]
        assert error(updates[i, k, :n], want) <= 1e-6, (cases[i]["name"], k)
        found = shares(weights[i, k, :tasks])
        np.testing.assert_allclose(found, entry["w_state"], atol=1e-6)
