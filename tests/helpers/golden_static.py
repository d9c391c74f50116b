"""Single updates of the methods that look at the Gram matrix, against reference numbers."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import Batch, error
from sampling import sampled

# Relative errors allowed: float64 closed forms and solvers, float32 the same.
CLOSED, SOLVED = (1e-6, 1e-4), (1e-5, 1e-3)
DTYPES = (jnp.float64, jnp.float32)
both_precisions = pytest.mark.parametrize("dtype", sampled(DTYPES, [jnp.float64]))
# Families with a zero in the hull by construction: rounding decides on which side a solution lies.
DEGENERATE = ("anticollinear", "all_zero", "one_zero")


def degenerate(name: str) -> bool:
    return name.startswith(DEGENERATE)


def check(
    dtype: Any,
    batch: Batch,
    names: list[str],
    wants: list[Any],
    make: Any,
    tolerances: tuple[float, float],
    single_exempt: Any = (),
    relative_to: tuple[str, str] = ("update", "gradients"),
    **run: Any,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Compares the updates, and returns them and the weights.

    A want of None asks for finite numbers only; so do cases in `single_exempt` in float32. `tolerances` and
    `relative_to` are those of `DTYPES`. Errors are compared with the largest gradient ("gradients"), of
    which rounding of the input alone moves the update by a share; the update itself ("own"); or the update
    where it does not vanish next to the gradients ("update").
    """
    assert any(want is not None for want in wants)
    tolerance, scale = (pair[DTYPES.index(dtype)] for pair in (tolerances, relative_to))
    updates, weights = batch.run(make, dtype, **run)
    for i, (name, want) in enumerate(zip(names, wants, strict=True)):
        assert np.isfinite(updates[i]).all() and np.isfinite(weights[i]).all(), name
        if want is None or (dtype == jnp.float32 and name in single_exempt):
            continue
        if scale == "gradients":
            found = np.abs(updates[i] - np.asarray(want)).max() / (batch.largest[i] or 1)
        else:
            found = error(updates[i], want, batch.largest[i] if scale == "update" else 0.0)
        assert found <= tolerance, (name, str(dtype), found)
    return updates, weights


def batch_of(cases: list[Any]) -> tuple[Batch, list[str]]:
    """The cases as one batch, and their names."""
    return Batch([c["G"] for c in cases]), [c["name"] for c in cases]


def flatten(cases: list[Any], key: str) -> list[tuple[Any, str, Any]]:
    """`(case, label, entry)` for every entry of a table inside each case."""
    return [(case, label, entry) for case in cases for label, entry in case[key].items()]


# The updates of these two have a length of their own: errors are compared with it.
OWN_LENGTH = ("own", "own")
