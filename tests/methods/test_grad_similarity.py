"""`grad_similarity` against reference numbers."""

from __future__ import annotations

import pytest
from golden_cases import (
    load,
)
from golden_sequences import TOLERANCE, compare_trees, run_trees

import mtl_optax as mtl


@pytest.mark.usefixtures("x64")
def test_golden() -> None:
    for case in load("loss/grad_similarity"):
        given = case["hyperparameters"]
        transformation = mtl.grad_similarity(
            case["T"],
            target=given["target"],
            mode=given["mode"],
            blocks={"global": "all", "tensor": "leaf"}[given["scope"]],
        )
        compare_trees(case, run_trees(transformation, case), TOLERANCE)
