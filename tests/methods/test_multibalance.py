"""`multibalance` against reference numbers, and what is its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden_cases import (
    error,
    load,
    pad_sequences,
    pad_vector,
    run_sequence,
)
from golden_sequences import TOLERANCE, each_step, shares
from sampling import sampled

import mtl_optax as mtl

MULTIBALANCE = [
    (direction, init)
    for direction in ("raw", "cos")
    for init in ("first", "zeros", "debias", "noema")
    if direction == "cos" or init in ("first", "noema")
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("direction", "init"), sampled(MULTIBALANCE, [("cos", "debias"), ("raw", "noema")])
)
def test_golden(direction: str, init: str) -> None:
    everything = load("gradient/multibalance")
    stored = {c["name"]: [s["G"] for s in c["steps"]] for c in everything if "G" in c["steps"][0]}
    cases = [c for c in everything if c["direction"] == direction and c["norm_ema_init"] == init]
    gradients, active = pad_sequences([stored[c["G_in_case"]] for c in cases])
    keywords = {
        "weight_lr": np.asarray([c["beta"] for c in cases]),
        "prior": np.stack([pad_vector(c["lambda0"], gradients.shape[2]) for c in cases]),
        "prior_strength": np.asarray([c["rho"] for c in cases]),
        "ema_decay": np.asarray([1 - c["gamma"] for c in cases]),
    }

    def make(num_tasks: int, **keywords: Any) -> Any:
        return mtl.multibalance(
            num_tasks,
            direction={"raw": "gradient", "cos": "cosine"}[direction],  # type: ignore[arg-type]
            ema_init="first" if init == "noema" else init,  # type: ignore[arg-type]
            **keywords,
        )

    found = run_sequence(make, gradients, active, keywords)
    for i, k, step in each_step(cases):
        want = step["update"]
        largest = np.linalg.norm(gradients[i, k][active[i]], axis=1).max()
        got = found.updates[i, k, : len(want)]
        assert error(got, want, largest) <= TOLERANCE, (cases[i]["name"], k)
        weights = shares(found.rule_state.simplex_weights[i, k, : len(step["lambda"])])
        np.testing.assert_allclose(weights, step["lambda"], rtol=0, atol=1e-9)
