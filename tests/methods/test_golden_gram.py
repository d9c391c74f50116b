"""The methods that look at the Gram matrix, against the static reference numbers."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import COMPARED, Batch, error, load, pad_order, pad_vector

import mtl_optax as mtl

# Relative errors allowed: float64 closed forms and solvers, float32 the same.
CLOSED, SOLVED = (1e-6, 1e-4), (1e-5, 1e-3)
DTYPES = (jnp.float64, jnp.float32)
# Families with a zero in the hull by construction: rounding decides on which side a solution lies.
DEGENERATE = ("anticollinear", "all_zero", "one_zero")


def degenerate(name: str) -> bool:
    return name.startswith(DEGENERATE)


def check(
    what: str,
    batch: Batch,
    names: list[str],
    wants: list[Any],
    make: Any,
    tolerances: tuple[float, float],
    single_exempt: Any = (),
    relative_to: tuple[str, str] = ("update", "gradients"),
    **run: Any,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Compares the updates in both precisions, and returns those in double precision, and the weights.

    `what` is the check's name in `COMPARED`. A want of None asks for finite numbers only; so do cases in
    `single_exempt` in float32. `relative_to` says in each precision what errors are compared with: the
    largest gradient ("gradients"), of which rounding of the input alone moves the update by a share; the
    update itself ("own"); or the update where it does not vanish next to the gradients ("update").
    """
    results, compared = [], []
    for dtype, tolerance, scale in zip(DTYPES, tolerances, relative_to, strict=True):
        updates, weights = batch.run(make, dtype, **run)
        compared.append(0)
        for i, (name, want) in enumerate(zip(names, wants, strict=True)):
            assert np.isfinite(updates[i]).all() and np.isfinite(weights[i]).all(), name
            if want is None or (dtype == jnp.float32 and name in single_exempt):
                continue
            if scale == "gradients":
                found = np.abs(updates[i] - np.asarray(want)).max() / (batch.largest[i] or 1)
            else:
                found = error(updates[i], want, batch.largest[i] if scale == "update" else 0.0)
            assert found <= tolerance, (name, str(dtype), found)
            compared[-1] += 1
        results.append((updates, weights))
    assert tuple(compared) == COMPARED[what]
    return results[0]


def batch_of(cases: list[Any]) -> tuple[Batch, list[str]]:
    """The cases as one batch, and their names."""
    return Batch([c["G"] for c in cases]), [c["name"] for c in cases]


def flatten(cases: list[Any], key: str) -> list[tuple[Any, str, Any]]:
    """`(case, label, entry)` for every entry of a table inside each case."""
    return [(case, label, entry) for case in cases for label, entry in case[key].items()]


@pytest.mark.usefixtures("x64")
def test_golden_mgda() -> None:
    cases = load("gradient/mgda")
    batch, names = batch_of(cases)
    wants = [c["update"] for c in cases]
    _, weights = check("mgda", batch, names, wants, mtl.mgda, SOLVED)
    unique = [(c, w) for c, w in zip(cases, weights, strict=True) if c["weights_unique"]]
    assert len(unique) == COMPARED["mgda weights"]
    for case, w in unique:
        assert error(w, case["weights"]) <= 1e-5, case["name"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["none", "l2", "loss", "loss+"])
def test_golden_mgda_normalized(mode: str) -> None:
    cases = load("gradient/mgda_normalized")
    batch, names = batch_of(cases)
    entries = [case["modes"][mode] for case in cases]
    # Where weights are not unique the raw combination is not either, only the normalised one.
    wants = [e.get("update_raw_grads") if e.get("weights_unique") else None for e in entries]
    losses = np.stack([pad_vector(c["losses"], batch.num_tasks, 1.0) for c in cases])
    make = functools.partial(mtl.mgda, normalize=mode)
    what = f"mgda_normalized {mode}"
    _, weights = check(what, batch, names, wants, make, SOLVED, losses=losses)
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
    assert compared == COMPARED[f"{what}, of normalised gradients"]


@pytest.mark.usefixtures("x64")
def test_golden_pcgrad() -> None:
    rows = flatten(load("gradient/pcgrad"), "orders")
    batch = Batch([case["G"] for case, _, _ in rows])
    names = [f"{case['name']} {label}" for case, label, _ in rows]
    orders = np.stack([pad_order(e["orders"], batch.num_tasks) for _, _, e in rows])
    # More tasks than dimensions: what is left of a gradient can be rounding alone, and its sign decides.
    exempt = [n for n in names if n.startswith(("rankdef", "collinear", "anticollinear"))]
    wants = [e["update"] for _, _, e in rows]
    tolerances = (1e-9, CLOSED[1])
    check("pcgrad", batch, names, wants, mtl.pcgrad, tolerances, exempt, order=orders)


@pytest.mark.usefixtures("x64")
def test_golden_gradsurgery_target() -> None:
    cases = load("gradient/gradsurgery_target")
    batch, names = batch_of(cases)
    wants = [c["update"] for c in cases]
    check("gradsurgery_target", batch, names, wants, mtl.grad_surgery, CLOSED)
    # Orthogonal up to rounding: its sign decides whether an auxiliary is kept.
    exempt = [n for n in names if n.startswith("orthogonal")]
    wants = [c["gradsimilarity_update"] for c in cases]
    check("gradsimilarity", batch, names, wants, mtl.grad_similarity, CLOSED, exempt)


@pytest.mark.usefixtures("x64")
def test_golden_cagrad() -> None:
    rows = flatten(load("gradient/cagrad"), "c")
    batch = Batch([case["G"] for case, _, _ in rows])
    names = [f"{case['name']} c={label}" for case, label, _ in rows]
    wants = [None if degenerate(case["name"]) else e["update"] for case, _, e in rows]
    radii = {"c": np.asarray([float(label) for _, label, _ in rows])}

    def rescaled(rescale: int) -> Any:
        return lambda num_tasks, c: mtl.cagrad(num_tasks, c=c, rescale=rescale)  # type: ignore[arg-type]

    plain, _ = check("cagrad", batch, names, wants, rescaled(0), SOLVED, keywords=radii)
    for rescale in (1, 2):
        updates, _ = batch.run(rescaled(rescale), keywords=radii)
        for u, p, c in zip(updates, plain, radii["c"], strict=True):
            divisor = 1 + c * c if rescale == 1 else 1 + c
            np.testing.assert_allclose(u, p / divisor, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_golden_imtl_g() -> None:
    cases = load("gradient/imtl_g")
    batch, names = batch_of(cases)
    # The weights sum to 1: where the coefficients nearly cancel, their error grows by the condition
    # number. Without a bound the closed form has no answer: finite only.
    usable = [(c.get("cond_unit_matrix") or np.inf) <= 1e4 for c in cases]
    wants = [c["update"] if ok else None for c, ok in zip(cases, usable, strict=True)]
    check("imtl_g", batch, names, wants, mtl.imtl_g, CLOSED)


@pytest.mark.usefixtures("x64")
def test_golden_config() -> None:
    cases = load("gradient/config")
    batch, names = batch_of(cases)
    check("config", batch, names, [c["update"] for c in cases], mtl.conflict_free, CLOSED)


# The updates of these two have a length of their own: errors are compared with it.
OWN_LENGTH = ("own", "own")


@pytest.mark.usefixtures("x64")
def test_golden_fairgrad() -> None:
    rows = flatten(load("gradient/fairgrad"), "alpha")
    batch = Batch([case["G"] for case, _, _ in rows])
    names = [f"{case['name']} alpha={label}" for case, label, _ in rows]
    wants = [None if degenerate(case["name"]) else e["update"] for case, _, e in rows]
    alpha = {"alpha": np.asarray([float(label) for _, label, _ in rows])}
    run = {"relative_to": OWN_LENGTH, "keywords": alpha}
    _, weights = check("fairgrad", batch, names, wants, mtl.fairgrad, SOLVED, **run)
    compared = 0
    for (case, label, entry), w in zip(rows, weights, strict=True):
        if entry["weights"] is not None and not degenerate(case["name"]):
            residual = np.asarray(case["G"]) @ np.asarray(case["G"]).T @ w * w ** (1 / float(label))
            assert np.abs(residual - 1).max() <= 1e-6, case["name"]
            compared += 1
    assert compared == COMPARED["fairgrad residuals"]


@pytest.mark.usefixtures("x64")
def test_golden_nash_mtl() -> None:
    cases = [case for case in load("gradient/nash_mtl") if "G" in case]
    batch, names = batch_of(cases)
    wants = [None if degenerate(case["name"]) else case["update"] for case in cases]
    check("nash_mtl", batch, names, wants, mtl.nash_mtl, SOLVED, relative_to=OWN_LENGTH)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_golden_aligned_mtl(scale: str) -> None:
    cases = [c for c in load("gradient/aligned_mtl") if scale in c["modes"]]
    batch, names = batch_of(cases)
    modes = [c["modes"][scale] for c in cases]
    # A Gram matrix holds the inverse singular values to eps * cond^2: 2e-6 at 1e5, 1e-5 in float32 at 10.
    usable = [(m.get("cond") or np.inf) <= 1e5 for m in modes]
    wants = [m["update_sum"] if ok else None for m, ok in zip(modes, usable, strict=True)]
    make = functools.partial(mtl.aligned_mtl, scale=scale)
    check(f"aligned_mtl {scale}", batch, names, wants, make, SOLVED)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_golden_upgrad_dualproj(name: str) -> None:
    cases = load("gradient/upgrad_dualproj")
    batch, names = batch_of(cases)
    wants = [c[name]["update"] for c in cases]
    scale = ("gradients", "gradients")
    check(name, batch, names, wants, getattr(mtl, name), SOLVED, relative_to=scale)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("byzantine", "selected"), [(1, 1), (1, 2), (0, 1)])
def test_golden_krum(byzantine: int, selected: int, squared: bool) -> None:
    key = f"krum_byz{byzantine}_sel{selected}"
    cases = [c for c in load("gradient/mean_sum_trimmed_krum") if key in c]
    assert len(cases) == COMPARED[key]
    batch = Batch([c["G"] for c in cases])

    def make(num_tasks: int) -> Any:
        return mtl.krum(num_tasks, num_byzantine=byzantine, num_selected=selected, squared=squared)

    updates, weights = batch.run(make)
    for case, update, w in zip(cases, updates, weights, strict=True):
        want = case[key]["weights_squared_distances" if squared else "weights"]
        np.testing.assert_allclose(w, want, atol=1e-12, err_msg=case["name"])
        assert error(update, np.asarray(want) @ np.asarray(case["G"])) <= 1e-9
