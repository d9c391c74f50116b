"""`db_mtl` against reference numbers, and what is its own."""

import functools

import numpy as np
import pytest
from golden_cases import parameters
from golden_elements import (
    SEQUENCE,
    STATIC,
    assert_steps_close,
    check,
    precisions,
    run,
    sequences,
    static,
    trajectory,
    tree_of,
)

import mtl_optax as mtl


@precisions(STATIC)
@pytest.mark.parametrize("norm", ["max", "min", "median", "mean"])
def test_golden_db_mtl_norms(x64, norm, dtype, tolerance):
    cases = static("gradient/db_mtl", lambda case: case.get(norm, {}).get("update"))
    make = functools.partial(mtl.db_mtl, ema_decay=0.0, log_losses=False, norm=norm)
    check(run(make, cases, dtype), tolerance)


@precisions(SEQUENCE)
def test_golden_db_mtl_sequences(x64, dtype, tolerance):
    cases = sequences("gradient/db_mtl", lambda step: step["update"], "grads_of_raw_losses")
    cases = [{**case, "losses": [s["losses"] for s in case["steps"]]} for case in cases]
    cases = [{**case, "ema_decay": case["beta"]} for case in cases]
    results = run(mtl.db_mtl, cases, dtype, ["ema_decay", "beta_sigma"], ["losses"])
    check(results, tolerance)


@precisions(STATIC)
@pytest.mark.parametrize("case", parameters("loss/db_mtl"))
def test_golden_loss_db_mtl(x64, case, dtype, tolerance):
    given = dict(case["hyperparameters"])
    tx = mtl.db_mtl(case["T"], ema_decay=given.pop("beta"), **given)
    updates, _ = trajectory(tx, case, dtype, case["losses"])
    total = [tree_of(flat, case["shapes"], np.float64) for flat in case["outputs"]["total"]]
    assert_steps_close(updates, total, tolerance, case["name"])
