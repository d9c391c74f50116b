"""`scale_by_mtadam` against reference numbers, and what is its own."""

import optax
import pytest
from golden_cases import parameters
from golden_elements import (
    STATIC,
    assert_close,
    assert_steps_close,
    parameter_steps,
    precisions,
    trajectory,
)

import mtl_optax as mtl


def is_plain(case):
    """Without what optax does after the method, and without AMSGrad; the norm averages do not know."""
    return not (case["hyperparameters"]["weight_decay"] or case["hyperparameters"]["amsgrad"])


@precisions(STATIC)
@pytest.mark.parametrize("case", parameters("loss/mtadam", quick=["ranks T=3"]))
def test_golden_mtadam(x64, case, dtype, tolerance):
    given = case["hyperparameters"]
    b1, b2, b3 = given["betas"]
    tx = optax.chain(
        mtl.scale_by_mtadam(case["T"], b1=b1, b2=b2, b3=b3, eps=given["eps"], ranks=given["ranks"]),
        optax.scale_by_learning_rate(given["lr"]),
    )
    updates, (states, *_) = trajectory(tx, case, dtype)
    assert len(case["outputs"]["norm_ema"]) == len(case["grads"])
    for step, want in enumerate(case["outputs"]["norm_ema"]):
        for key, ema in states.rule_state.norm_ema.items():
            assert_close(ema[step], [task[key] for task in want], tolerance, message=case["name"])
    if is_plain(case):
        assert_steps_close(updates, parameter_steps(case), tolerance, case["name"])
