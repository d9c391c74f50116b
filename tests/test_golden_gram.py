"""The methods that look at the Gram matrix, against the static reference numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import Batch, error, pad_order, pad_vector

import mtl_optax as mtl
from mtl_optax.solvers.simplex import project_onto_simplex

# Relative errors allowed: float64 closed forms and solvers, float32 the same.
CLOSED, SOLVED = (1e-6, 1e-4), (1e-5, 1e-3)
DTYPES = (jnp.float64, jnp.float32)
# Families with a zero in the hull by construction: rounding decides on which side a solution lies.
DEGENERATE = ("anticollinear", "all_zero", "one_zero")


def degenerate(name: str) -> bool:
    return name.startswith(DEGENERATE)


def check(
    batch: Batch,
    names: list[str],
    wants: list[Any],
    make: Any,
    tolerances: tuple[float, float],
    single_exempt: Any = (),
    relative_to_gradients: bool = False,
    **run: Any,
) -> None:
    """Compares the updates in both precisions; a want of None asks for finite numbers only.

    Cases in `single_exempt` are asked to be finite only in float32.
    """
    assert sum(want is not None for want in wants) > len(wants) / 3
    for dtype, tolerance in zip(DTYPES, tolerances, strict=True):
        updates, weights = batch.run(make, dtype, **run)
        for i, (name, want) in enumerate(zip(names, wants, strict=True)):
            assert np.isfinite(updates[i]).all() and np.isfinite(weights[i]).all(), name
            if want is None or (dtype == jnp.float32 and name in single_exempt):
                continue
            if relative_to_gradients or dtype == jnp.float32:
                # Rounding of the input alone moves the update by this share of the gradients.
                found = np.abs(updates[i] - np.asarray(want)).max() / (batch.largest[i] or 1)
            else:
                found = error(updates[i], want, batch.largest[i])
            assert found <= tolerance, (name, str(dtype), found)


def load(golden: Any, stem: str) -> tuple[Batch, list[str], list[Any]]:
    cases = golden(f"gradient/{stem}")["cases"]
    cases = [case for case in cases if "G" in case]
    return Batch([c["G"] for c in cases]), [c["name"] for c in cases], cases


def flatten(cases: list[Any], key: str) -> list[tuple[Any, str, Any]]:
    """`(case, label, entry)` for every entry of a table inside each case."""
    return [(case, label, entry) for case in cases for label, entry in case[key].items()]


@pytest.mark.usefixtures("x64")
def test_golden_mgda(golden: Any) -> None:
    batch, names, cases = load(golden, "mgda")
    check(batch, names, [c["update"] for c in cases], mtl.mgda, SOLVED)
    _, weights = batch.run(mtl.mgda)
    for case, w in zip(cases, weights, strict=True):
        if case["weights_unique"]:
            assert error(w, case["weights"]) <= 1e-5, case["name"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["none", "l2", "loss", "loss+"])
def test_golden_mgda_normalized(golden: Any, mode: str) -> None:
    batch, names, cases = load(golden, "mgda_normalized")
    entries = [case["modes"][mode] for case in cases]
    # Where weights are not unique the raw combination is not either, only the normalised one.
    wants = [e.get("update_raw_grads") if e.get("weights_unique") else None for e in entries]
    losses = np.stack([pad_vector(c["losses"], batch.num_tasks, 1.0) for c in cases])

    def make(num_tasks: int) -> Any:
        return mtl.mgda(num_tasks, normalize=mode)  # type: ignore[arg-type]

    check(batch, names, wants, make, SOLVED, losses=losses)
    _, weights = batch.run(make, losses=losses)
    for case, entry, w in zip(cases, entries, weights, strict=True):
        if entry.get("update_normalized_grads") is None or entry["weights"] is None:
            continue
        g, loss = np.asarray(case["G"]), np.asarray(case["losses"])
        norms = np.linalg.norm(g, axis=1)
        divisor = {"none": 1, "l2": norms, "loss": loss, "loss+": loss * norms}[mode]
        units = g / np.broadcast_to(divisor, norms.shape)[:, None]
        length = np.linalg.norm(units, axis=1).max()
        assert error(w @ units, entry["update_normalized_grads"], length) <= 1e-5, case["name"]


@pytest.mark.usefixtures("x64")
def test_golden_pcgrad(golden: Any) -> None:
    cases = golden("gradient/pcgrad")["cases"]
    rows = flatten(cases, "orders")
    batch = Batch([case["G"] for case, _, _ in rows])
    names = [f"{case['name']} {label}" for case, label, _ in rows]
    orders = np.stack([pad_order(e["orders"], batch.num_tasks) for _, _, e in rows])
    # More tasks than dimensions: what is left of a gradient can be rounding alone, and its sign decides.
    exempt = [n for n in names if n.startswith(("rankdef", "collinear", "anticollinear"))]
    wants = [e["update"] for _, _, e in rows]
    check(batch, names, wants, mtl.pcgrad, CLOSED, exempt, order=orders)
    updates, _ = batch.run(mtl.pcgrad, order=orders)
    for update, want, largest in zip(updates, wants, batch.largest, strict=True):
        assert error(update, want, largest) <= 1e-9


@pytest.mark.usefixtures("x64")
def test_golden_gradsurgery_target(golden: Any) -> None:
    batch, names, cases = load(golden, "gradsurgery_target")
    check(batch, names, [c["update"] for c in cases], mtl.grad_surgery, CLOSED)
    # Orthogonal up to rounding: its sign decides whether an auxiliary is kept.
    exempt = [n for n in names if n.startswith("orthogonal")]
    wants = [c["gradsimilarity_update"] for c in cases]
    check(batch, names, wants, mtl.grad_similarity, CLOSED, exempt)


@pytest.mark.usefixtures("x64")
def test_golden_cagrad(golden: Any) -> None:
    rows = flatten(golden("gradient/cagrad")["cases"], "c")
    batch = Batch([case["G"] for case, _, _ in rows])
    names = [f"{case['name']} c={label}" for case, label, _ in rows]
    wants = [None if degenerate(case["name"]) else e["update"] for case, _, e in rows]
    radii = {"c": np.asarray([float(label) for _, label, _ in rows])}

    def rescaled(rescale: int) -> Any:
        return lambda num_tasks, c: mtl.cagrad(num_tasks, c=c, rescale=rescale)  # type: ignore[arg-type]

    check(batch, names, wants, rescaled(0), SOLVED, keywords=radii)
    plain, _ = batch.run(rescaled(0), keywords=radii)
    for rescale in (1, 2):
        updates, _ = batch.run(rescaled(rescale), keywords=radii)
        for u, p, c in zip(updates, plain, radii["c"], strict=True):
            divisor = 1 + c * c if rescale == 1 else 1 + c
            np.testing.assert_allclose(u, p / divisor, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_golden_imtl_g(golden: Any) -> None:
    batch, names, cases = load(golden, "imtl_g")
    # The weights sum to 1: where the coefficients nearly cancel, their error grows by the condition
    # number. Without a bound the closed form has no answer: finite only.
    usable = [(c.get("cond_unit_matrix") or np.inf) <= 1e4 for c in cases]
    wants = [c["update"] if ok else None for c, ok in zip(cases, usable, strict=True)]
    check(batch, names, wants, mtl.imtl_g, CLOSED)


@pytest.mark.usefixtures("x64")
def test_golden_config(golden: Any) -> None:
    batch, names, cases = load(golden, "config")
    check(batch, names, [c["update"] for c in cases], mtl.config, CLOSED)


@pytest.mark.usefixtures("x64")
def test_golden_fairgrad(golden: Any) -> None:
    rows = flatten(golden("gradient/fairgrad")["cases"], "alpha")
    batch = Batch([case["G"] for case, _, _ in rows])
    names = [f"{case['name']} alpha={label}" for case, label, _ in rows]
    wants = [None if degenerate(case["name"]) else e["update"] for case, _, e in rows]
    alpha = {"alpha": np.asarray([float(label) for _, label, _ in rows])}
    _, weights = batch.run(mtl.fairgrad, keywords=alpha)
    for dtype, tolerance in zip(DTYPES, SOLVED, strict=True):
        # The update has a length of its own: it is compared with itself, not with the gradients.
        updates, _ = batch.run(mtl.fairgrad, dtype, keywords=alpha)
        for name, update, want in zip(names, updates, wants, strict=True):
            assert np.isfinite(update).all(), name
            if want is not None:
                assert error(update, want) <= tolerance, (name, str(dtype))
    for (case, label, entry), w in zip(rows, weights, strict=True):
        if entry["weights"] is not None and not degenerate(case["name"]):
            residual = np.asarray(case["G"]) @ np.asarray(case["G"]).T @ w * w ** (1 / float(label))
            assert np.abs(residual - 1).max() <= 1e-6, case["name"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_golden_aligned_mtl(golden: Any, scale: str) -> None:
    rows = [c for c in golden("gradient/aligned_mtl")["cases"] if scale in c["modes"]]
    batch = Batch([c["G"] for c in rows])
    names = [c["name"] for c in rows]
    modes = [c["modes"][scale] for c in rows]
    # A Gram matrix holds the inverse singular values to eps * cond^2: 2e-6 at 1e5, 1e-5 in float32 at 10.
    usable = [(m.get("cond") or np.inf) <= 1e5 for m in modes]
    wants = [m["update_sum"] if ok else None for m, ok in zip(modes, usable, strict=True)]
    exempt = [n for n, m in zip(names, modes, strict=True) if (m.get("cond") or np.inf) > 20]

    def make(num_tasks: int) -> Any:
        return mtl.aligned_mtl(num_tasks, scale=scale)  # type: ignore[arg-type]

    check(batch, names, wants, make, SOLVED, exempt)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_golden_upgrad_dualproj(golden: Any, name: str) -> None:
    batch, names, cases = load(golden, "upgrad_dualproj")
    wants = [c[name]["update"] for c in cases]
    check(batch, names, wants, getattr(mtl, name), SOLVED, relative_to_gradients=True)


@pytest.mark.usefixtures("x64")
def test_golden_mean_sum_krum(golden: Any) -> None:
    batch, names, cases = load(golden, "mean_sum_trimmed_krum")
    check(batch, names, [c["sum"] for c in cases], mtl.sum_tasks, CLOSED)
    check(batch, names, [c["mean"] for c in cases], mtl.mean_tasks, CLOSED)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("byzantine", "selected"), [(1, 1), (1, 2), (0, 1)])
def test_golden_krum(golden: Any, byzantine: int, selected: int, squared: bool) -> None:
    key = f"krum_byz{byzantine}_sel{selected}"
    cases = [c for c in golden("gradient/mean_sum_trimmed_krum")["cases"] if key in c]
    batch = Batch([c["G"] for c in cases])

    def make(num_tasks: int) -> Any:
        return mtl.krum(num_tasks, num_byzantine=byzantine, num_selected=selected, squared=squared)

    updates, weights = batch.run(make)
    for case, update, w in zip(cases, updates, weights, strict=True):
        want = case[key]["weights_squared_distances" if squared else "weights"]
        np.testing.assert_allclose(w, want, atol=1e-12, err_msg=case["name"])
        assert error(update, np.asarray(want) @ np.asarray(case["G"])) <= 1e-9


@pytest.mark.usefixtures("x64")
def test_golden_nash_mtl(golden: Any) -> None:
    batch, names, cases = load(golden, "nash_mtl")
    for dtype, tolerance in zip(DTYPES, SOLVED, strict=True):
        updates, weights = batch.run(mtl.nash_mtl, dtype)
        for case, update, w, name in zip(cases, updates, weights, names, strict=True):
            assert np.isfinite(update).all() and np.isfinite(w).all(), name
            if case["update"] is not None and not degenerate(name):
                assert error(update, case["update"]) <= tolerance, (name, str(dtype))


@pytest.mark.usefixtures("x64")
def test_golden_simplex_projection(golden: Any) -> None:
    cases = golden("gradient/simplex_projection")["cases"]
    size = max(len(c["y"]) for c in cases)
    points = np.stack([pad_vector(c["y"], size) for c in cases])
    active = np.stack([np.arange(size) < len(c["y"]) for c in cases])
    found = jax.jit(jax.vmap(project_onto_simplex))(jnp.asarray(points), jnp.asarray(active))
    for case, x in zip(cases, np.asarray(found), strict=True):
        want = pad_vector(case["projection"], size)
        np.testing.assert_allclose(x, want, atol=1e-12, err_msg=case["name"])
