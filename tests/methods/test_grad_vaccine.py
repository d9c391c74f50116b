"""`grad_vaccine` against reference numbers, and what is its own."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from golden_cases import (
    error,
    load,
    pad_order,
    pad_sequences,
    run_sequence,
)
from golden_sequences import TOLERANCE, each_step, pad_steps

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
def test_golden_gradvac() -> None:
    cases = load("gradient/gradvac")
    gradients, active = pad_sequences([[s["G"] for s in c["steps"]] for c in cases])
    size = gradients.shape[2]
    order = pad_steps(cases, lambda s: pad_order(s["orders"], size), (size, size)).astype(int)
    decay = {"ema_decay": np.asarray([1 - c["beta"] for c in cases])}
    found = run_sequence(mtl.grad_vaccine, gradients, active, decay, {"order": order})
    for i, k, step in each_step(cases):
        g = np.asarray(step["G"])
        largest = np.linalg.norm(g, axis=1).max()
        got = found.updates[i, k, : g.shape[1]]
        assert error(got, step["update"], largest) <= TOLERANCE, (cases[i]["name"], k)
        averages = found.rule_state.similarity_ema[i, k, : len(g), : len(g)]
        np.testing.assert_allclose(averages, step["rho_after"], rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("x64")
def test_golden_gradvac_without_eps() -> None:
    """The formula as written, where the reference recorded it and no gradient vanishes."""
    cases = load("gradient/gradvac")
    cases = [c for c in cases if c["name"].startswith("seq_scales")]
    gradients, active = pad_sequences([[s["G"] for s in c["steps"]] for c in cases])
    size = gradients.shape[2]
    order = pad_steps(cases, lambda s: pad_order(s["orders"], size), (size, size)).astype(int)
    make = functools.partial(mtl.grad_vaccine, ema_decay=0.5, eps=0.0)
    found = run_sequence(make, gradients, active, extra={"order": order})
    for i, k, step in each_step(cases, lambda s: "update_eps0" in s):
        assert error(found.updates[i, k], step["update_eps0"]) <= TOLERANCE, k
