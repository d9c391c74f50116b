"""The methods that remember something and look at the Gram matrix, against reference sequences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_cases import (
    COMPARED,
    error,
    load,
    pad_order,
    pad_sequences,
    pad_vector,
    run_sequence,
)

import mtl_optax as mtl

TOLERANCE = 1e-7


def each_step(
    cases: list[Any], what: str, keep: Callable[[Any], bool] = lambda step: True
) -> list[tuple[int, int, Any]]:
    """`(case number, step number, step)` of the steps that the check `what` of `COMPARED` compares."""
    steps = [row for row in _all_steps(cases) if keep(row[2])]
    assert len(steps) == COMPARED[what]
    return steps


def _all_steps(cases: list[Any]) -> list[tuple[int, int, Any]]:
    return [(i, k, step) for i, case in enumerate(cases) for k, step in enumerate(case["steps"])]


def pad_steps(cases: list[Any], pick: Any, shape: tuple[int, ...]) -> np.ndarray:
    """`pick(step)`, of the given shape, as `[cases, steps, *shape]`; zeros after the last step."""
    steps = max(len(case["steps"]) for case in cases)
    result = np.zeros((len(cases), steps, *shape))
    for i, k, step in _all_steps(cases):
        result[i, k] = pick(step)
    return result


def products(left: Any, right: Any, size: int) -> np.ndarray:
    """Inner products of two batches' gradients, padded to `[size, size]`."""
    inner = np.asarray(left) @ np.asarray(right).T
    result = np.zeros((size, size))
    result[: len(inner), : len(inner)] = inner
    return result


def shares(simplex_weights: Any) -> np.ndarray:
    """Of what a case's tasks hold together: the absent ones that pad it keep their part."""
    return np.asarray(simplex_weights) / np.sum(simplex_weights)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("every", [1, 3])
def test_golden_nash_mtl_sequence(every: int) -> None:
    cases = load("gradient/nash_mtl")
    cases = [c for c in cases if "steps" in c and c["update_weights_every"] == every]
    gradients, active = pad_sequences([[s["G"] for s in c["steps"]] for c in cases])
    make = functools.partial(mtl.nash_mtl, update_every=every)
    found = run_sequence(make, gradients, active)
    assert np.isfinite(found.updates).all()
    # The official program clips the update, as the next transformation of a chain does here.
    clip = optax.clip_by_global_norm(1.0)
    clipped = jax.vmap(jax.vmap(lambda update: clip.update(update, clip.init(update))[0]))(
        found.updates
    )
    compared = 0
    for i, k, step in _all_steps(cases):
        g = np.asarray(step["G"])
        used = np.asarray(cases[i]["steps"][k - k % every]["G"])
        if step["update_exact_maxnorm1"] is None or not np.linalg.norm(used, axis=1).all():
            continue  # a zero gradient: no solution exists, the reference keeps old weights
        want = np.asarray(step["update_exact_maxnorm1"])
        # The reference divides by norm + 1e-6 where it clips; an exact clip divides by the norm.
        norm = np.linalg.norm(np.asarray(step["weights_exact"]) @ g)
        want = want * (norm + 1e-6) / norm if norm > 1 else want
        assert error(clipped[i, k, : g.shape[1]], want) <= TOLERANCE, (cases[i]["name"], k)
        compared += 1
    assert compared == COMPARED[f"nash_mtl sequences, every {every}"]
    failed = found.rule_state.fallback_count[:, -1]
    assert (failed > 0).any() and (failed == 0).any()


@pytest.mark.usefixtures("x64")
def test_golden_gradvac() -> None:
    cases = load("gradient/gradvac")
    gradients, active = pad_sequences([[s["G"] for s in c["steps"]] for c in cases])
    size = gradients.shape[2]
    order = pad_steps(cases, lambda s: pad_order(s["orders"], size), (size, size)).astype(int)
    decay = {"ema_decay": np.asarray([1 - c["beta"] for c in cases])}
    found = run_sequence(mtl.grad_vaccine, gradients, active, decay, {"order": order})
    for i, k, step in each_step(cases, "gradvac"):
        g = np.asarray(step["G"])
        largest = np.linalg.norm(g, axis=1).max()
        got = found.updates[i, k, : g.shape[1]]
        assert error(got, step["update"], largest) <= TOLERANCE, (cases[i]["name"], k)
        averages = found.rule_state.similarity_ema[i, k, : len(g), : len(g)]
        np.testing.assert_allclose(averages, step["rho_after"], rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("x64")
def test_golden_gradvac_without_eps() -> None:
    """The formula as written, where the reference recorded it and no gradient vanishes."""
    cases = load("gradient/gradvac")
    cases = [c for c in cases if c["name"].startswith("seq_scales")]
    gradients, active = pad_sequences([[s["G"] for s in c["steps"]] for c in cases])
    size = gradients.shape[2]
    order = pad_steps(cases, lambda s: pad_order(s["orders"], size), (size, size)).astype(int)
    make = functools.partial(mtl.grad_vaccine, ema_decay=0.5, eps=0.0)
    found = run_sequence(make, gradients, active, extra={"order": order})
    for i, k, step in each_step(cases, "gradvac without eps", lambda s: "update_eps0" in s):
        assert error(found.updates[i, k], step["update_eps0"]) <= TOLERANCE, k


@pytest.mark.usefixtures("x64")
def test_golden_modo() -> None:
    cases = load("gradient/modo")
    third, active = pad_sequences([[s["G3"] for s in c["steps"]] for c in cases])
    first, _ = pad_sequences([[s["G1"] for s in c["steps"]] for c in cases])
    second, _ = pad_sequences([[s["G2"] for s in c["steps"]] for c in cases])
    size = third.shape[2]
    gram = pad_steps(cases, lambda s: products(s["G1"], s["G2"], size), (size, size))
    keywords = {
        "weight_lr": np.asarray([c["gamma"] for c in cases]),
        "rho": np.asarray([c["rho"] for c in cases]),
    }
    for gradients, key in ((third, "update_third_sample"), (first + second, "update_sum_of_two")):
        found = run_sequence(mtl.modo, gradients, active, keywords, {"gram": gram})
        for i, k, step in each_step(cases, "modo"):
            want = step[key]
            assert error(found.updates[i, k, : len(want)], want) <= TOLERANCE, (cases[i]["name"], k)
            weights = found.weights[i, k, : len(step["weights"])]
            np.testing.assert_allclose(weights, step["weights"], rtol=0, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("run", ["official_function", "libmtl", "official_training_class_aliased"])
def test_golden_sdmgrad(run: str) -> None:
    """The official numbers exactly: its 1e-4 under the root only rescales the steps on w."""
    cases = load("gradient/sdmgrad")
    aliased = run.endswith("aliased")
    rate = 5.0 if run == "libmtl" else 10.0
    sample = "xi_prime" if aliased else "zeta"
    gradients, active = pad_sequences([[s[sample] for s in c["steps"]] for c in cases])
    size = gradients.shape[2]

    def gram(step: Any) -> np.ndarray:
        left = step["xi_prime" if aliased else "xi"]
        return products(left, step["xi_prime"], size)

    def step_size(step: Any) -> float:
        tasks = len(step["xi"])
        diagonal = np.diagonal(gram(step))[:tasks]
        if run == "libmtl":
            return rate  # adds nothing under the root
        theirs = np.sqrt(diagonal + 1e-4).mean()
        ours = np.sqrt(np.maximum(diagonal, 0)).mean()
        return rate * (ours / theirs) ** 2

    matrices = pad_steps(cases, gram, (size, size))
    rates = pad_steps(cases, step_size, ())

    def one(sequence: Any, active: Any, matrices: Any, rates: Any) -> Any:
        start = mtl.sdmgrad(size).init(jnp.zeros(sequence.shape[2]))

        def step(state: Any, inputs: Any) -> Any:
            g, matrix, rate = inputs
            transformation = mtl.sdmgrad(size, step_size=rate)
            extra = {} if aliased else {"gram": matrix}
            update, state = transformation.update(g, state, active=active, **extra)
            return state, (update, state.rule_state.simplex_weights[0])

        return jax.lax.scan(step, start, (sequence, matrices, rates))[1]

    updates, weights = jax.jit(jax.vmap(one))(gradients, active, matrices, rates)
    kind = "aliased" if aliased else run

    def steady(step: Any) -> bool:
        """Whether the trajectory has not yet amplified noise of 1e-12 to more than the tolerance."""
        return step["sensitivity_to_1e-12_relative_input_noise"][kind] <= 1e-9

    for i, k, step in each_step(cases, f"sdmgrad {run}", steady):
        tasks, n = len(step["xi"]), len(step["xi"][0])
        entry = step[run]
        want = np.asarray(entry["update_xT"]) / tasks if aliased else entry["update"]
        assert error(updates[i, k, :n], want) <= 1e-6, (cases[i]["name"], k)
        found = shares(weights[i, k, :tasks])
        np.testing.assert_allclose(found, entry["w_state"], atol=1e-6)


MULTIBALANCE = [
    (direction, init)
    for direction in ("raw", "cos")
    for init in ("first", "zeros", "debias", "noema")
    if direction == "cos" or init in ("first", "noema")
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("direction", "init"), MULTIBALANCE)
def test_golden_multibalance(direction: str, init: str) -> None:
    everything = load("gradient/multibalance")
    stored = {c["name"]: [s["G"] for s in c["steps"]] for c in everything if "G" in c["steps"][0]}
    cases = [c for c in everything if c["direction"] == direction and c["norm_ema_init"] == init]
    gradients, active = pad_sequences([stored[c["G_in_case"]] for c in cases])
    keywords = {
        "weight_lr": np.asarray([c["beta"] for c in cases]),
        "prior": np.stack([pad_vector(c["lambda0"], gradients.shape[2]) for c in cases]),
        "prior_strength": np.asarray([c["rho"] for c in cases]),
        "ema_decay": np.asarray([1 - c["gamma"] for c in cases]),
    }

    def make(num_tasks: int, **keywords: Any) -> Any:
        return mtl.multibalance(
            num_tasks,
            direction={"raw": "gradient", "cos": "cosine"}[direction],  # type: ignore[arg-type]
            ema_init="first" if init == "noema" else init,  # type: ignore[arg-type]
            **keywords,
        )

    found = run_sequence(make, gradients, active, keywords)
    for i, k, step in each_step(cases, f"multibalance {direction} {init}"):
        want = step["update"]
        largest = np.linalg.norm(gradients[i, k][active[i]], axis=1).max()
        got = found.updates[i, k, : len(want)]
        assert error(got, want, largest) <= TOLERANCE, (cases[i]["name"], k)
        weights = shares(found.rule_state.simplex_weights[i, k, : len(step["lambda"])])
        np.testing.assert_allclose(weights, step["lambda"], rtol=0, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_golden_torchjd_extras_cr_mogm() -> None:
    cases = load("gradient/torchjd_extras")
    gradients, active = pad_sequences([[s["G"] for s in c["steps"]] for c in cases])
    weights = run_sequence(mtl.cr_mogm, gradients, active).weights
    for i, k, step in each_step(cases, "cr_mogm"):
        want = np.asarray(step["cr_mogm_weights"])
        found = weights[i, k, : len(want)]
        # Two tasks: the reference's Frank-Wolfe steps are exact. Three: they stop 2e-3 short of a vertex.
        allowed = 1e-7 if len(want) == 2 else 2e-3
        np.testing.assert_allclose(found, want, rtol=0, atol=allowed, err_msg=cases[i]["name"])
        if k == 0:
            g = np.asarray(step["G"])
            ours, theirs = (np.linalg.norm(w @ g) for w in (found, want))
            assert ours <= theirs * (1 + 1e-9)


# --- trees ------------------------------------------------------------------------------------------


def tree_of(flat: Any, shapes: Any) -> Any:
    return {name: np.asarray(flat[name], float).reshape(shape) for name, shape in shapes.items()}


def stack_tasks(gradients: Any, shapes: Any) -> Any:
    trees = [tree_of(g, shapes) for g in gradients]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def run_trees(transformation: Any, case: Any, losses: Any = None) -> Any:
    """Updates of a sequence of stacked trees, the step axis first."""
    steps = [stack_tasks(g, case["shapes"]) for g in case["grads"]]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
    given = None if losses is None else jnp.asarray(losses)

    def step(state: Any, inputs: Any) -> Any:
        g, losses = inputs
        extra = {} if losses is None else {"losses": losses}
        update, state = transformation.update(g, state, **extra)
        return state, update

    start = transformation.init({n: jnp.zeros(s) for n, s in case["shapes"].items()})
    return jax.jit(lambda: jax.lax.scan(step, start, (stacked, given))[1])()


def compare_trees(case: Any, updates: Any, tolerance: float) -> None:
    assert len(case["outputs"]["total"]) == len(case["grads"])
    for k, want in enumerate(case["outputs"]["total"]):
        for name, leaf in tree_of(want, case["shapes"]).items():
            assert error(updates[name][k], leaf) <= tolerance, (case["name"], k, name)


@pytest.mark.usefixtures("x64")
def test_golden_metabalance() -> None:
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


@pytest.mark.usefixtures("x64")
def test_golden_grad_similarity() -> None:
    for case in load("loss/grad_similarity"):
        given = case["hyperparameters"]
        transformation = mtl.grad_similarity(
            case["T"],
            target=given["target"],
            mode=given["mode"],
            blocks={"global": "all", "tensor": "leaf"}[given["scope"]],
        )
        compare_trees(case, run_trees(transformation, case), TOLERANCE)


@pytest.mark.usefixtures("x64")
def test_golden_emtl() -> None:
    for case in load("loss/emtl"):
        given = case["hyperparameters"]
        keywords = {
            "epsilon": given["epsilon"],
            "rho": given["rho"],
            "step_size": given["eta_p"],
        }
        if case["kind"] == "full":
            # The file's alpha are those of MGDA on raw gradients.
            transformation = mtl.emtl(case["T"], base=mtl.mgda(case["T"]), **keywords)
            compare_trees(case, run_trees(transformation, case, case["losses"]), 1e-6)
        else:
            weights = _emtl_weights(case, keywords)
            want = np.asarray(case["outputs"]["weights"])
            assert weights.shape == want.shape
            assert error(weights, want) <= 1e-6, case["name"]


def _emtl_weights(case: Any, keywords: Any) -> np.ndarray:
    """EMTL over weights alpha that the case prescribes, on orthogonal gradients of prescribed norms."""
    tasks = case["T"]
    plain = mtl.fixed_weights(tasks, np.ones(tasks))
    start = mtl.emtl(tasks, base=plain, **keywords).init(jnp.zeros(tasks))

    def step(state: Any, inputs: Any) -> Any:
        alpha, losses, norms = inputs
        transformation = mtl.emtl(tasks, base=mtl.fixed_weights(tasks, alpha), **keywords)
        _, state = transformation.update(jnp.diag(norms), state, losses=losses)
        return state, state.weights[0]

    inputs = tuple(jnp.asarray(case[key]) for key in ("alpha", "losses", "grad_norms"))
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, start, inputs)[1])())
