"""Methods that work element by element, or with buffers, against reference numbers.

All cases of a method run as one vmapped scan: vectors padded with zeros, which no method here can tell
from no element, and the tasks that a case does not have absent.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import load

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


def check(results, tolerance):
    """Compares the updates of all steps."""
    assert results
    for case, updates, _ in results:
        for update, want, gradients in zip(updates, case["want"], case["G"], strict=True):
            assert_close(update, want, tolerance, gradients, case["name"])


def precisions(double, single=SINGLE):
    return pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [(np.float64, double), pytest.param(np.float32, single, marks=pytest.mark.slow)],
    )


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
