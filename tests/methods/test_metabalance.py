"""`metabalance` against reference numbers."""

from __future__ import annotations

import pytest
from golden_cases import (
    load,
)
from golden_sequences import TOLERANCE, compare_trees, run_trees

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
def test_golden() -> None:
    strategies = {"A": "shrink", "B": "enlarge", "C": "both"}
    for case in load("loss/metabalance"):
        given = case["hyperparameters"]
        transformation = mtl.metabalance(
            case["T"],
            target=given["target"],
            relax_factor=given["relax_factor"],
            strategy=strategies[given["strategy"]],  # type: ignore[arg-type]
            ema_decay=given["beta"],
        )
        compare_trees(case, run_trees(transformation, case), TOLERANCE)
