"""The properties that `method_properties.py` declares, tested both ways.

A declared property must hold on every input of `INPUTS`; one that a method does not declare must fail on
at least one of them, or stand in `UNDECLARED` with the reason why these inputs cannot show it.
Every method is compiled once, in double precision, and run for six steps on all inputs at a time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_properties import BROAD, PROPERTIES, make

import mtl_optax as mtl

T, N, STEPS = 3, 8, 6
# Relative to the largest gradient or update: what solvers promise in double precision.
TOLERANCE = 1e-5
# A violation must be far above rounding to count as one.
VIOLATION = 1e-4


def _inputs():
    """Input classes by name, each `[STEPS, T, N]`."""
    draw = np.random.default_rng(0)
    full = draw.normal(size=(STEPS, T, N))
    base = draw.normal(size=(T, N))
    orthogonal = np.linalg.qr(base.T)[0].T
    plane = np.zeros((T, N))
    plane[:, [1, 6]] = [[1.0, 0.2], [-0.3, 1.0], [0.7, 0.9]]
    # Pairwise cosines of -0.4: 0 is just outside the convex hull.
    conflicting = orthogonal - 0.41 * orthogonal.mean(axis=0) * T / 1.5
    sizes = np.array([1.0, 2.0, 5.0])
    conflicting = np.stack([conflicting * np.roll(sizes, k)[:, None] for k in range(STEPS)])
    first, second = full[:, 0], full[:, 1]
    # Other weights give 0 in every step, so that a memory of weights does not help.
    share = 1.0 + np.arange(STEPS)[:, None]
    stationary = np.stack([first, second, -(share * first + 2 * second) / 3], axis=1)
    classes = {
        "rank_deficient": plane,
        "opposite": np.stack([base[0], -base[0], base[2]]),
        "spread": base * np.array([[1e-3], [1.0], [1e3]]),
        "duplicates": np.stack([base[0], base[0], base[2]]),
    }
    repeated = {name: np.broadcast_to(g, (STEPS, T, N)) for name, g in classes.items()}
    return {"full_rank": full, "conflicting": conflicting, "stationary": stationary, **repeated}


INPUTS = _inputs()
NAMES = list(INPUTS)
GRADIENTS = np.stack(list(INPUTS.values()))
LOSSES = np.random.default_rng(1).uniform(0.2, 2.0, size=(len(NAMES), STEPS, T))


@functools.cache
def program(name):
    """`([C, STEPS, T, N], [C, STEPS, T]) -> (last updates [C, N], last weights [C, T])`."""
    tx = make(name, T)

    def tree(flat):
        return {"a": flat[..., :3], "b": flat[..., 3:]}

    @jax.jit
    @jax.vmap
    def run(gradients, losses):
        params = tree(jnp.zeros(N))

        def body(state, step):
            gradients, losses = step
            update, state = tx.update(tree(gradients), state, params, losses=losses)
            flat = jnp.concatenate([update["a"], update["b"]])
            return state, (flat, jnp.ravel(state.weights))

        _, (updates, weights) = jax.lax.scan(body, tx.init(params), (gradients, losses))
        return updates[-1], weights[-1]

    return run


def run(name, gradients=GRADIENTS, losses=LOSSES):
    with jax.enable_x64(True):
        return [np.asarray(x) for x in program(name)(jnp.asarray(gradients), jnp.asarray(losses))]


@functools.cache
def plain(name):
    return run(name)


def _size(x):
    return np.linalg.norm(x, axis=-1)


def _difference(update, other):
    """Relative difference per input class, where two zero updates are equal."""
    largest = np.maximum(_size(update), _size(other))
    noise = 1e-9 * _size(GRADIENTS).max(axis=(1, 2))
    return _size(update - other) / np.maximum(largest, noise)


# --- how far a method is from having each property, per input class -----------------------------------


def non_conflicting(name):
    update, last = plain(name)[0], GRADIENTS[:, -1]
    inner = np.einsum("ctn,cn->ct", last, update)
    # A zero update hurts nobody; below that size its direction is rounding.
    size = np.maximum(_size(update), 1e-9 * _size(last).max(axis=1))
    return np.maximum(-inner / (_size(last) * size[:, None]), 0).max(axis=1)


def permutation(name):
    order = np.array([2, 0, 1])
    permuted = run(name, GRADIENTS[:, :, order], LOSSES[:, :, order])[0]
    return _difference(plain(name)[0], permuted)


def scale(name):
    return _difference(plain(name)[0], run(name, 1e-7 * GRADIENTS)[0] * 1e7)


def task_scale(name):
    factors = np.array([1e-2, 1.0, 1e3])
    scaled = run(name, GRADIENTS * factors[:, None], LOSSES * factors)[0]
    return _difference(plain(name)[0], scaled)


def simplex(name):
    weights = plain(name)[1]
    if weights.shape[1] != T:
        return np.full(len(NAMES), np.inf)
    return np.maximum(np.abs(weights.sum(axis=1) - 1), -weights.min(axis=1))


def stationary(name):
    """The update over the largest gradient, where 0 is in the convex hull."""
    size = _size(plain(name)[0]) / _size(GRADIENTS[:, -1]).max(axis=1)
    return np.where([name in ("stationary", "opposite") for name in NAMES], size, 0)


def split(name):
    """Coordinates that change places between leaves."""
    order = np.array([3, 1, 5, 0, 7, 2, 6, 4])
    moved = run(name, GRADIENTS[..., order])[0][:, np.argsort(order)]
    return _difference(plain(name)[0], moved)


MEASURES = {
    function.__name__: function
    for function in (non_conflicting, permutation, scale, task_scale, simplex, stationary, split)
}

# Not declared, although no input above shows a violation: (method, property) -> why.
_NO_CONTRACTION = "exact arithmetic has it, but steps of 10 can amplify rounding to order 1"
UNDECLARED = {("sdmgrad", key): _NO_CONTRACTION for key in ("permutation", "scale", "split")}
UNDECLARED["ldc_mtl", "simplex"] = "its trained values are still almost equal after six steps"

# Inputs on which a method's own definition leaves its update open: (method, input) -> why.
AMBIGUOUS = {
    (
        "emtl",
        "duplicates",
    ): "the min-norm weights of two equal tasks are not unique, and multiply p",
}


def _table(declared):
    return [
        pytest.param(name, key, id=f"{name}-{key}", marks=() if name in BROAD else pytest.mark.slow)
        for name in sorted(mtl.METHODS)
        for key in MEASURES
        if (key in PROPERTIES[name]) == declared
    ]


def test_every_method_declares_known_properties():
    assert set(PROPERTIES) == set(mtl.METHODS)
    for name, properties in PROPERTIES.items():
        assert properties <= set(MEASURES), name


@pytest.mark.parametrize(("name", "key"), _table(declared=True))
def test_declared_property_holds(name, key):
    distance = dict(zip(NAMES, MEASURES[key](name), strict=True))
    defined = [value for case, value in distance.items() if (name, case) not in AMBIGUOUS]
    assert max(defined) <= TOLERANCE, distance


@pytest.mark.parametrize(("name", "key"), _table(declared=False))
def test_property_that_is_not_declared_fails(name, key):
    distance = dict(zip(NAMES, MEASURES[key](name), strict=True))
    shown = max(distance.values()) > VIOLATION
    excused = (name, key) in UNDECLARED
    assert shown != excused, (distance, UNDECLARED.get((name, key)))
