"""`graddrop` against reference numbers."""

from golden_elements import check, precisions, run, static

import mtl_optax as mtl


@precisions(1e-9)
def test_golden(x64, dtype, tolerance):
    # The remaining case, a mask per feature of a representation, is another method.
    plain = static("gradient/graddrop", lambda case: case["update"])
    leaky = static("gradient/graddrop", lambda case: case["update_leak"])
    cases = [{**c, "leak": [0.0] * len(c["G"][0])} for c in plain] + leaky
    cases = [{**c, "noise": [c["U"]]} for c in cases]
    check(run(mtl.graddrop, cases, dtype, ["leak"], ["noise"]), tolerance)
