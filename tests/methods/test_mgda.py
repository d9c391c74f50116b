"""`mgda` against reference numbers, and what is its own."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from golden_cases import error, load, pad_vector
from golden_static import SOLVED, batch_of, both_precisions, check
from sampling import sampled

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
@both_precisions
def test_golden(dtype: Any) -> None:
    cases = load("gradient/mgda")
    batch, names = batch_of(cases)
    wants = [c["update"] for c in cases]
    _, weights = check(dtype, batch, names, wants, mtl.mgda, SOLVED)
    if dtype == np.float32:
        return
    unique = [(c, w) for c, w in zip(cases, weights, strict=True) if c["weights_unique"]]
    assert unique
    for case, w in unique:
        assert error(w, case["weights"]) <= 1e-5, case["name"]


@pytest.mark.usefixtures("x64")
@both_precisions
@pytest.mark.parametrize("mode", sampled(["none", "l2", "loss", "loss+"], ["loss+"]))
def test_golden_mgda_normalized(mode: str, dtype: Any) -> None:
    cases = load("gradient/mgda_normalized")
    batch, names = batch_of(cases)
    entries = [case["modes"][mode] for case in cases]
    # Where weights are not unique the raw combination is not either, only the normalised one.
    wants = [e.get("update_raw_grads") if e.get("weights_unique") else None for e in entries]
    losses = np.stack([pad_vector(c["losses"], batch.num_tasks, 1.0) for c in cases])
    make = functools.partial(mtl.mgda, normalize=mode)
    _, weights = check(dtype, batch, names, wants, make, SOLVED, losses=losses)
    if dtype == np.float32:
        return
    compared = 0
    for case, entry, w in zip(cases, entries, weights, strict=True):
        if entry.get("update_normalized_grads") is None or entry["weights"] is None:
            continue
        g, loss = np.asarray(case["G"]), np.asarray(case["losses"])
        norms = np.linalg.norm(g, axis=1)
        divisor = {"none": 1, "l2": norms, "loss": loss, "loss+": loss * norms}[mode]
        units = g / np.broadcast_to(divisor, norms.shape)[:, None]
        length = np.linalg.norm(units, axis=1).max()
        assert error(w @ units, entry["update_normalized_grads"], length) <= 1e-5, case["name"]
        compared += 1
    assert compared
