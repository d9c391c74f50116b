"""`emtl` against reference numbers, and what is its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import error, parameters
from golden_sequences import compare_trees, run_trees

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case", parameters("loss/emtl", quick=["T=3 rho .3", "full T=3 zero gradient"])
)
def test_golden(case: Any) -> None:
    given = case["hyperparameters"]
    keywords = {"epsilon": given["epsilon"], "rho": given["rho"], "step_size": given["eta_p"]}
    if case["kind"] == "full":
        # The file's alpha are those of MGDA on raw gradients.
        transformation = mtl.emtl(case["T"], base=mtl.mgda(case["T"]), **keywords)
        compare_trees(case, run_trees(transformation, case, case["losses"]), 1e-6)
    else:
        weights = _emtl_weights(case, keywords)
        want = np.asarray(case["outputs"]["weights"])
        assert weights.shape == want.shape
        assert error(weights, want) <= 1e-6


def _emtl_weights(case: Any, keywords: Any) -> np.ndarray:
    """EMTL over weights alpha that the case prescribes, on orthogonal gradients of prescribed norms."""
    tasks = case["T"]
    plain = mtl.fixed_weights(tasks, np.ones(tasks))
    start = mtl.emtl(tasks, base=plain, **keywords).init(jnp.zeros(tasks))

    def step(state: Any, inputs: Any) -> Any:
        alpha, losses, norms = inputs
        transformation = mtl.emtl(tasks, base=mtl.fixed_weights(tasks, alpha), **keywords)
        _, state = transformation.update(jnp.diag(norms), state, losses=losses)
        return state, state.weights[0]

    inputs = tuple(jnp.asarray(case[key]) for key in ("alpha", "losses", "grad_norms"))
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, start, inputs)[1])())
