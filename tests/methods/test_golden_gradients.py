"""The methods that work element by element, or with buffers, against reference numbers.

Compiling is what takes the time, so all cases of a method run as one vmapped scan: vectors padded with
zeros, which no method here can tell from no element, and the tasks that a case does not have absent.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_cases import COMPARED, load, parameters

import mtl_optax as mtl

# Relative to the largest entry of the reference update.
STATIC, SEQUENCE, SINGLE = 1e-6, 1e-7, 1e-4


def padded(arrays, dtype):
    """Arrays stacked along a new first axis, with zeros where one is shorter."""
    arrays = [np.asarray(a, np.float64) for a in arrays]
    shape = np.max([a.shape for a in arrays], axis=0)
    out = np.zeros((len(arrays), *shape), dtype)
    for k, array in enumerate(arrays):
        out[(k, *map(slice, array.shape))] = array
    return jnp.asarray(out)


def run(make, cases, dtype, numbers=(), extra=()):
    """Every case's updates and weights, step by step: `(case, [K, n], [K, T])`.

    `make(T, **numbers)` gives the method; `numbers` are the names of a case's hyperparameters, which are
    traced, and `extra` those of its extra arguments of `update`, one a step. Tasks that a case does not
    have are absent in every step, so that one program runs them all.
    """
    inputs = {name: padded([case[name] for case in cases], dtype) for name in ("G", *extra)}
    traced = {name: padded([case[name] for case in cases], dtype) for name in numbers}
    count, _, num_tasks, size = inputs["G"].shape
    active = np.arange(num_tasks) < np.array([[len(case["G"][0])] for case in cases])

    @jax.jit
    @jax.vmap
    def program(inputs, traced, active):
        tx = make(num_tasks, **traced)

        def body(state, step):
            gradients = step.pop("G")
            update, state = tx.update(gradients, state, active=active, **step)
            return state, (update, state.weights[0])

        return jax.lax.scan(body, tx.init(jnp.zeros(size, dtype)), inputs)[1]

    updates, weights = map(np.asarray, program(inputs, traced, jnp.asarray(active)))
    results = []
    for k in range(count):
        steps, tasks, entries = np.shape(cases[k]["G"])
        results.append((cases[k], updates[k, :steps, :entries], weights[k, :steps, :tasks]))
    return results


def assert_close(got, want, tolerance, gradients=None, message=""):
    """Relative to the largest entry of `want`, or where that is rounding, to a part of the gradients'."""
    rounding = 1e-9 if np.asarray(got).dtype == np.float64 else 1e-2
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, message
    size = np.abs(want).max(initial=0)
    if gradients is not None:
        size = max(size, rounding * np.abs(np.asarray(gradients)).max(initial=0))
    assert np.abs(got - want).max(initial=0) <= tolerance * size, (message, got, want)


def static(file, key):
    """Single updates as sequences of one step; `key(case)` is the reference update or None."""
    return [
        {**case, "G": [case["G"]], "want": [key(case)]}
        for case in load(file)
        if "G" in case and key(case) is not None
    ]


def sequences(file, want, gradients="G"):
    """`want(step)` is the reference update of a step."""
    return [
        {
            **case,
            "G": [step[gradients] for step in case["steps"]],
            "want": [want(step) for step in case["steps"]],
        }
        for case in load(file)
        if "steps" in case
    ]


def check(what, results, tolerance):
    """Compares the updates of all steps; `what` is the check's name in `COMPARED`."""
    compared = 0
    for case, updates, _ in results:
        for update, want, gradients in zip(updates, case["want"], case["G"], strict=True):
            assert_close(update, want, tolerance, gradients, case["name"])
            compared += 1
    assert compared == COMPARED[what]


def precisions(double, single=SINGLE):
    return pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [(np.float64, double), pytest.param(np.float32, single, marks=pytest.mark.slow)],
    )


@precisions(1e-9)
def test_golden_graddrop(x64, dtype, tolerance):
    # The remaining case, a mask per feature of a representation, is another method.
    plain = static("gradient/graddrop", lambda case: case["update"])
    leaky = static("gradient/graddrop", lambda case: case["update_leak"])
    cases = [{**c, "leak": [0.0] * len(c["G"][0])} for c in plain] + leaky
    cases = [{**c, "noise": [c["U"]]} for c in cases]
    check("graddrop", run(mtl.graddrop, cases, dtype, ["leak"], ["noise"]), tolerance)


@precisions(SEQUENCE)
def test_golden_moco(x64, dtype, tolerance):
    cases = sequences("gradient/moco", lambda step: step["author"]["update"])
    cases = [{**case, **case["author_hyperparameters"]} for case in cases]
    cases = [{**c, "ema_decay": 1 - c["beta"], "weight_lr": c["gamma"]} for c in cases]
    results = run(mtl.moco, cases, dtype, ["ema_decay", "weight_lr", "rho"])
    check("moco", results, tolerance)
    for case, _, weights in results:
        want = [step["author"]["lambda"] for step in case["steps"]]
        assert_close(weights, want, tolerance, message=case["name"])


@precisions(STATIC)
@pytest.mark.parametrize("norm", ["max", "min", "median", "mean"])
def test_golden_db_mtl_norms(x64, norm, dtype, tolerance):
    cases = static("gradient/db_mtl", lambda case: case.get(norm, {}).get("update"))
    make = functools.partial(mtl.db_mtl, ema_decay=0.0, log_losses=False, norm=norm)
    check(f"db_mtl {norm}", run(make, cases, dtype), tolerance)


@precisions(SEQUENCE)
def test_golden_db_mtl_sequences(x64, dtype, tolerance):
    cases = sequences("gradient/db_mtl", lambda step: step["update"], "grads_of_raw_losses")
    cases = [{**case, "losses": [s["losses"] for s in case["steps"]]} for case in cases]
    cases = [{**case, "ema_decay": case["beta"]} for case in cases]
    results = run(mtl.db_mtl, cases, dtype, ["ema_decay", "beta_sigma"], ["losses"])
    check("db_mtl sequences", results, tolerance)


@precisions(SEQUENCE)
def test_golden_rotograd_scale(x64, dtype, tolerance):
    cases = sequences("gradient/rotograd_scale", lambda step: step["update"])
    check("rotograd_scale", run(mtl.rotograd_scale, cases, dtype), tolerance)


# The quadratic program is a solver: 1e-5 in double, 1e-3 in single precision.
@precisions(1e-5, 1e-3)
def test_golden_torchjd_extras_pcd(x64, dtype, tolerance):
    cases = sequences("gradient/torchjd_extras", lambda step: step["pcd_update"])
    check("pcd", run(mtl.pcd, cases, dtype), tolerance)


@precisions(STATIC)
@pytest.mark.parametrize("name", ["sum", "mean", "trimmed_mean_1", "trimmed_mean_2"])
def test_golden_mean_sum_trimmed_krum_reducers(x64, name, dtype, tolerance):
    cases = static("gradient/mean_sum_trimmed_krum", lambda case: case.get(name))
    make = {"sum": mtl.sum_tasks, "mean": mtl.mean_tasks}.get(name)
    if make is None:
        make = functools.partial(mtl.trimmed_mean, trim_number=int(name[-1]))
    check(name, run(make, cases, dtype), tolerance)


# --- trees of named tensors ---------------------------------------------------------------------------


def tree_of(flat, shapes, dtype):
    return {key: jnp.asarray(np.reshape(flat[key], shape), dtype) for key, shape in shapes.items()}


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def trajectory(tx, case, dtype, losses=None):
    """All updates of a case as one tree of `[K, *shape]`, and the states."""
    shapes = case["shapes"]
    gradients = stack([stack([tree_of(g, shapes, dtype) for g in step]) for step in case["grads"]])
    params = {key: jnp.zeros(shape, dtype) for key, shape in shapes.items()}
    extra = {} if losses is None else {"losses": jnp.asarray(losses, dtype)}

    @jax.jit
    def program(gradients, extra):
        def body(state, step):
            gradients, extra = step
            update, state = tx.update(gradients, state, params, **extra)
            return state, (update, state)

        return jax.lax.scan(body, tx.init(params), (gradients, extra))[1]

    return program(gradients, extra)


def assert_steps_close(updates, wanted, tolerance, name):
    wanted = stack(wanted)
    assert wanted.keys() == updates.keys()
    for key, want in wanted.items():
        for got_step, want_step in zip(updates[key], want, strict=True):
            assert_close(got_step, want_step, tolerance, message=f"{name}, {key}")


def parameter_steps(case):
    """The differences of the reference parameters."""
    shapes = case["shapes"]
    path = [case["init"], *case["outputs"]["params"]]
    trees = [tree_of(flat, shapes, np.float64) for flat in path]
    return [
        jax.tree.map(lambda new, old: new - old, new, old) for old, new in itertools.pairwise(trees)
    ]


def is_plain(case):
    """Without what optax does after the method, and without AMSGrad; the norm averages do not know."""
    return not (case["hyperparameters"]["weight_decay"] or case["hyperparameters"]["amsgrad"])


@precisions(STATIC)
@pytest.mark.parametrize("case", parameters("loss/mtadam"))
def test_golden_mtadam(x64, case, dtype, tolerance):
    given = case["hyperparameters"]
    b1, b2, b3 = given["betas"]
    tx = optax.chain(
        mtl.scale_by_mtadam(case["T"], b1=b1, b2=b2, b3=b3, eps=given["eps"], ranks=given["ranks"]),
        optax.scale_by_learning_rate(given["lr"]),
    )
    updates, (states, *_) = trajectory(tx, case, dtype)
    assert len(case["outputs"]["norm_ema"]) == len(case["grads"])
    for step, want in enumerate(case["outputs"]["norm_ema"]):
        for key, ema in states.rule_state.norm_ema.items():
            assert_close(ema[step], [task[key] for task in want], tolerance, message=case["name"])
    assert sum(map(is_plain, load("loss/mtadam"))) == COMPARED["mtadam updates"]
    if is_plain(case):
        assert_steps_close(updates, parameter_steps(case), tolerance, case["name"])


def scale_by_adagrad(eps):
    """AdaGrad with epsilon outside the root, where optax has it inside."""

    def update(updates, state, params=None):
        sums = jax.tree.map(lambda s, g: s + g**2, state, updates)
        return jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + eps), updates, sums), sums

    return optax.GradientTransformation(lambda params: optax.tree.zeros_like(params), update)


@precisions(STATIC)
@pytest.mark.parametrize("case", parameters("loss/adatask"))
def test_golden_adatask(x64, case, dtype, tolerance):
    given = case["hyperparameters"]
    inner = {
        "adam": lambda: optax.scale_by_adam(given["b1"], given["b2"], given["eps"]),
        "rmsprop": lambda: optax.scale_by_rms(given["decay"], given["eps"], eps_in_sqrt=False),
        "adagrad": lambda: scale_by_adagrad(given["eps"]),
    }[given["rule"]]
    tx = optax.chain(mtl.adatask(case["T"], inner()), optax.scale(-given["lr"]))
    updates, _ = trajectory(tx, case, dtype)
    assert_steps_close(updates, parameter_steps(case), tolerance, case["name"])


@precisions(STATIC)
@pytest.mark.parametrize("case", parameters("loss/db_mtl"))
def test_golden_loss_db_mtl(x64, case, dtype, tolerance):
    given = dict(case["hyperparameters"])
    tx = mtl.db_mtl(case["T"], ema_decay=given.pop("beta"), **given)
    updates, _ = trajectory(tx, case, dtype, case["losses"])
    total = [tree_of(flat, case["shapes"], np.float64) for flat in case["outputs"]["total"]]
    assert_steps_close(updates, total, tolerance, case["name"])


@precisions(SEQUENCE)
@pytest.mark.parametrize("case", parameters("loss/ol_aux"))
def test_golden_ol_aux(x64, case, dtype, tolerance):
    given = case["hyperparameters"]
    tx = mtl.ol_aux(
        case["T"],
        target=case["target"],
        weight_lr=given["weight_lr"],
        update_every=given["update_interval"],
        filter_window=given["filter_window"] or 1,
        nonnegative=given["clip_nonnegative"],
    )
    updates, states = trajectory(tx, case, dtype)
    before = [[1.0, *weights] for weights in case["outputs"]["aux_weights_before"]]
    assert_close(states.weights[:, 0], before, tolerance, message=case["name"])
    final = [1.0, *case["outputs"]["aux_weights_final"]]
    assert_close(states.rule_state.task_weights[-1, 0], final, tolerance, message=case["name"])
    for key in case["shapes"]:
        gradients = np.array([[task[key] for task in step] for step in case["grads"]])
        want = np.einsum("kt,kti->ki", before, gradients)
        assert_close(updates[key].reshape(want.shape), want, tolerance, gradients, case["name"])
