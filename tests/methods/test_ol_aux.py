"""`ol_aux` against reference numbers."""

import numpy as np
import pytest
from golden_cases import parameters
from golden_elements import SEQUENCE, assert_close, precisions, trajectory

import mtl_optax as mtl


@precisions(SEQUENCE)
@pytest.mark.parametrize(
    "case", parameters("loss/ol_aux", quick=["paper K=2 N=3", "N=1 no filter K=1"])
)
def test_golden(x64, case, dtype, tolerance):
    given = case["hyperparameters"]
    tx = mtl.ol_aux(
        case["T"],
        target=case["target"],
        weight_lr=given["weight_lr"],
        update_every=given["update_interval"],
        filter_window=given["filter_window"] or 1,
        nonnegative=given["clip_nonnegative"],
    )
    updates, states = trajectory(tx, case, dtype)
    before = [[1.0, *weights] for weights in case["outputs"]["aux_weights_before"]]
    assert_close(states.weights[:, 0], before, tolerance, message=case["name"])
    final = [1.0, *case["outputs"]["aux_weights_final"]]
    assert_close(states.rule_state.task_weights[-1, 0], final, tolerance, message=case["name"])
    for key in case["shapes"]:
        gradients = np.array([[task[key] for task in step] for step in case["grads"]])
        want = np.einsum("kt,kti->ki", before, gradients)
        assert_close(updates[key].reshape(want.shape), want, tolerance, gradients, case["name"])
