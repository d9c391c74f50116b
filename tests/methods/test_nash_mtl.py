"""`nash_mtl` against reference numbers, and what is its own."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from golden_cases import (
    error,
    load,
    pad_sequences,
    run_sequence,
)
from golden_sequences import TOLERANCE, all_steps
from golden_static import OWN_LENGTH, SOLVED, batch_of, both_precisions, check, degenerate

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
@both_precisions
def test_golden(dtype: Any) -> None:
    cases = [case for case in load("gradient/nash_mtl") if "G" in case]
    batch, names = batch_of(cases)
    wants = [None if degenerate(case["name"]) else case["update"] for case in cases]
    check(dtype, batch, names, wants, mtl.nash_mtl, SOLVED, relative_to=OWN_LENGTH)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("every", [1, 3])
def test_golden_nash_mtl_sequence(every: int) -> None:
    cases = load("gradient/nash_mtl")
    cases = [c for c in cases if "steps" in c and c["update_weights_every"] == every]
    gradients, active = pad_sequences([[s["G"] for s in c["steps"]] for c in cases])
    make = functools.partial(mtl.nash_mtl, update_every=every)
    found = run_sequence(make, gradients, active)
    assert np.isfinite(found.updates).all()
    # The official program clips the update, as the next transformation of a chain does here.
    clip = optax.clip_by_global_norm(1.0)
    clipped = jax.vmap(jax.vmap(lambda update: clip.update(update, clip.init(update))[0]))(
        found.updates
    )
    compared = 0
    for i, k, step in all_steps(cases):
        g = np.asarray(step["G"])
        used = np.asarray(cases[i]["steps"][k - k % every]["G"])
        if step["update_exact_maxnorm1"] is None or not np.linalg.norm(used, axis=1).all():
            continue  # a zero gradient: no solution exists, the reference keeps old weights
        want = np.asarray(step["update_exact_maxnorm1"])
        # The reference divides by norm + 1e-6 where it clips; an exact clip divides by the norm.
        norm = np.linalg.norm(np.asarray(step["weights_exact"]) @ g)
        want = want * (norm + 1e-6) / norm if norm > 1 else want
        assert error(clipped[i, k, : g.shape[1]], want) <= TOLERANCE, (cases[i]["name"], k)
        compared += 1
    assert compared
    failed = found.rule_state.fallback_count[:, -1]
    assert (failed > 0).any() and (failed == 0).any()
