"""`modo` against reference numbers."""

from __future__ import annotations

import numpy as np
import pytest
from golden_cases import (
    error,
    load,
    pad_sequences,
    run_sequence,
)
from golden_sequences import TOLERANCE, each_step, pad_steps, products

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
def test_golden() -> None:
    cases = load("gradient/modo")
    third, active = pad_sequences([[s["G3"] for s in c["steps"]] for c in cases])
    first, _ = pad_sequences([[s["G1"] for s in c["steps"]] for c in cases])
    second, _ = pad_sequences([[s["G2"] for s in c["steps"]] for c in cases])
    size = third.shape[2]
    gram = pad_steps(cases, lambda s: products(s["G1"], s["G2"], size), (size, size))
    keywords = {
        "weight_lr": np.asarray([c["gamma"] for c in cases]),
        "rho": np.asarray([c["rho"] for c in cases]),
    }
    for gradients, key in ((third, "update_third_sample"), (first + second, "update_sum_of_two")):
        found = run_sequence(mtl.modo, gradients, active, keywords, {"gram": gram})
        for i, k, step in each_step(cases):
            want = step[key]
            assert error(found.updates[i, k, : len(want)], want) <= TOLERANCE, (cases[i]["name"], k)
            weights = found.weights[i, k, : len(step["weights"])]
            np.testing.assert_allclose(weights, step["weights"], rtol=0, atol=1e-10)
