"""`moco` against reference numbers."""

from golden_elements import SEQUENCE, assert_close, check, precisions, run, sequences

import mtl_optax as mtl


@precisions(SEQUENCE)
def test_golden(x64, dtype, tolerance):
    cases = sequences("gradient/moco", lambda step: step["author"]["update"])
    cases = [{**case, **case["author_hyperparameters"]} for case in cases]
    cases = [{**c, "ema_decay": 1 - c["beta"], "weight_lr": c["gamma"]} for c in cases]
    results = run(mtl.moco, cases, dtype, ["ema_decay", "weight_lr", "rho"])
    check(results, tolerance)
    for case, _, weights in results:
        want = [step["author"]["lambda"] for step in case["steps"]]
        assert_close(weights, want, tolerance, message=case["name"])
