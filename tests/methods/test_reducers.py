"""The plain reducers against reference numbers."""

import functools

import pytest
from golden_elements import STATIC, check, precisions, run, static

import mtl_optax as mtl


@precisions(STATIC)
@pytest.mark.parametrize("name", ["sum", "mean", "trimmed_mean_1", "trimmed_mean_2"])
def test_golden_mean_sum_trimmed_krum_reducers(x64, name, dtype, tolerance):
    cases = static("gradient/mean_sum_trimmed_krum", lambda case: case.get(name))
    make = {"sum": mtl.sum_tasks, "mean": mtl.mean_tasks}.get(name)
    if make is None:
        make = functools.partial(mtl.trimmed_mean, trim_number=int(name[-1]))
    check(run(make, cases, dtype), tolerance)
