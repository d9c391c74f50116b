"""`metabalance` against reference numbers."""

from __future__ import annotations

from typing import Any

import pytest
from golden_cases import parameters
from golden_sequences import TOLERANCE, compare_trees, run_trees

import mtl_optax as mtl

STRATEGIES = {"A": "shrink", "B": "enlarge", "C": "both"}
QUICK = ("A r=0.7 T=3", "B r=0.7 T=3", "C r=0.9 T=3 zero aux mid-run")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", parameters("loss/metabalance", quick=QUICK))
def test_golden(case: Any) -> None:
    given = case["hyperparameters"]
    transformation = mtl.metabalance(
        case["T"],
        target=given["target"],
        relax_factor=given["relax_factor"],
        strategy=STRATEGIES[given["strategy"]],  # type: ignore[arg-type]
        ema_decay=given["beta"],
    )
    compare_trees(case, run_trees(transformation, case), TOLERANCE)
