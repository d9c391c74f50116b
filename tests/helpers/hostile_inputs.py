"""Batches of hostile input for every method: the worst that gradients, losses and tasks can be.

A batch is run twice through the same compiled program. In the first run a task of an event holds NaN or
infinity, and absent tasks hold 0; in the second the same task is absent instead, and all absent tasks
hold junk. The two must give the same bits, and only finite ones.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from method_properties import make

CASES, STEPS = 64, 4
# One leaf of each precision, a scalar among them, and nothing.
PARAMS = {
    "matrix": jnp.zeros((2, 2)),
    "none": None,
    "scalar": jnp.zeros((), jnp.float16),
    "vector": jnp.zeros((1,), jnp.bfloat16),
}
N = 6
# Where the leaves lie among the N numbers, and what their dtypes hold.
SHAPES = {"matrix": (0, 4, (2, 2)), "scalar": (4, 5, ()), "vector": (5, 6, (1,))}
LIMITS = np.array([3e38] * 4 + [6e4, 3e38])
JUNK = (0.0, 1e9, np.nan, np.inf, -np.inf, 3e38)
BAD = (np.nan, np.inf, -np.inf)
# The norm whose square overflows in float32, and exponents next to it and to the smallest norm.
TOO_LARGE = 1.8e19
EDGES = (-19.5, -19, -18.7, 18, 18.7)


class Batch(NamedTuple):
    """One run's input: `[CASES, STEPS, T, N]` gradients, `[CASES, STEPS, T]` losses and presence."""

    gradients: np.ndarray
    losses: np.ndarray
    active: np.ndarray


def draw(seed: int, tasks: int = 4) -> tuple[Batch, Batch, np.ndarray]:
    """The two runs, and how often each task of each case is broken `[CASES, T]`."""
    rng = np.random.default_rng(seed)
    shape = (CASES, STEPS, tasks)
    gradients, losses = _gradients(rng, tasks), _losses(rng, tasks)
    active = rng.random(shape) > rng.choice([0.0, 0.3, 0.9], size=(CASES, 1, 1))
    # In a third of the cases fewer tasks take part from the first step to the last.
    active &= np.arange(tasks) < rng.choice([tasks, tasks, 1, 2, 3], size=(CASES, 1, 1))
    too_large = active & (np.linalg.norm(gradients.astype(np.float64), axis=-1) > TOO_LARGE)
    broken = active & (rng.random(shape) < rng.choice([0.0, 0.2], size=(CASES, 1, 1)))
    first_g, first_l = np.where(active[..., None], gradients, 0), np.where(active, losses, 1)
    second_g, second_l = first_g.copy(), first_l.copy()
    for event in np.argwhere(broken):
        # All of a gradient, or one element of it.
        where = (*event, slice(None) if rng.random() < 0.5 else rng.integers(N))
        first_g[where] = rng.choice(BAD)
        if rng.random() < 0.5:
            first_l[tuple(event)] = rng.choice(BAD)
    broken |= too_large
    absent = ~active | broken
    second_g[absent] = rng.choice(JUNK, size=(absent.sum(), 1))
    second_l[absent] = rng.choice(JUNK, size=absent.sum())
    first = Batch(first_g, first_l, active)
    return first, Batch(second_g, second_l, active & ~broken), broken.sum(axis=1)


def _gradients(rng: np.random.Generator, tasks: int) -> np.ndarray:
    """Norms over the whole range of float32, and every degenerate position.

    In half of the cases the norms are 1e-18 to 1e18 and spread over up to twelve decades, in the others
    each is anything from 1e-38 to 3e38.
    """
    base = rng.normal(size=(CASES, STEPS, tasks, N))
    kinds = rng.integers(len(_KINDS), size=CASES)
    for case, kind in enumerate(kinds):
        base[case] = _KINDS[kind](base[case], rng)
    still = rng.random(CASES) < 0.3
    base[still] = base[still][:, :1]
    spread = rng.choice([0.0, 2.0, 6.0], size=(CASES, 1, 1))
    middle = rng.uniform(-18 + spread, 18 - spread)
    middle = np.where(rng.random((CASES, 1, 1)) < 0.5, 0, middle)
    exponents = middle + rng.uniform(-1, 1, size=(CASES, STEPS, tasks)) * spread
    anything = rng.uniform(-38, 38.4, size=exponents.shape)
    anything = np.where(
        rng.random(exponents.shape) < 0.2, rng.choice(EDGES, anything.shape), anything
    )
    exponents = np.where(rng.random((CASES, 1, 1)) < 0.5, exponents, anything)
    scaled = np.clip(base * 10.0 ** exponents[..., None], -LIMITS, LIMITS)
    # A method may look at all leaves together or at each: none should overflow in one view only.
    norms = np.linalg.norm(scaled, axis=-1, keepdims=True)
    unclear = (norms > TOO_LARGE / 2) & (norms < TOO_LARGE * 4)
    return np.where(unclear, scaled / 16, scaled).astype(np.float32)


def _zero_rows(g: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return g * (rng.random(g.shape[:2])[..., None] < 0.5)


def _opposite(g: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return g[:, :1] * ((-1.0) ** np.arange(g.shape[1]))[:, None]


def _zero_sum(g: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """0 in the convex hull of the first three tasks."""
    return np.concatenate([g[:, :2], -g[:, :2].sum(1, keepdims=True), g[:, 3:]], axis=1)[
        :, : g.shape[1]
    ]


_KINDS = (
    lambda g, rng: g,
    _zero_rows,
    lambda g, rng: g * 0,
    lambda g, rng: g[:, :1] + 0 * g,
    _opposite,
    lambda g, rng: g[:, :1] * rng.normal(size=(g.shape[1], 1)),
    lambda g, rng: g[:, :1] + 1e-6 * g,
    lambda g, rng: _opposite(g, rng) + 1e-6 * g,
    lambda g, rng: np.linalg.qr(g.swapaxes(1, 2))[0].swapaxes(1, 2),
    _zero_sum,
    lambda g, rng: g * (rng.random(N) < 0.3),
)


def _losses(rng: np.random.Generator, tasks: int) -> np.ndarray:
    shape = (CASES, STEPS, tasks)
    usual = rng.uniform(0.1, 2.0, size=shape)
    wild = rng.choice([0.0, 1e30, 1e-30, -1.0, 1.0, 1e-8, 1e6], size=shape)
    chosen = np.where(rng.random((CASES, 1, 1)) < 0.5, usual, wild)
    still = rng.random(CASES) < 0.3
    chosen[still] = chosen[still][:, :1]
    return chosen.astype(np.float32)


def tree(flat):
    """The gradient tree of `[..., N]` numbers."""
    leaves = {
        name: flat[..., low:high].reshape(*flat.shape[:-1], *tail).astype(PARAMS[name].dtype)
        for name, (low, high, tail) in SHAPES.items()
    }
    return {**leaves, "none": None}


@functools.cache
def program(name, tasks, options=()):
    """`Batch -> (updates, last state)` of a method with `options`, pairs, compiled once."""
    tx = make(name, tasks, **dict(options))

    @jax.jit
    @jax.vmap
    def run(batch):
        def body(state, step):
            gradients, losses, active = step
            update, state = tx.update(tree(gradients), state, PARAMS, losses=losses, active=active)
            return state, update

        return jax.lax.scan(body, tx.init(PARAMS), tuple(batch))[::-1]

    return run


def without_counts(state):
    """The state but for `skipped`, which distinguishes a broken task from an absent one."""
    return state._replace(skipped=())


def failures(name, seed, tasks=4, options=()):
    """`what went wrong -> cases` for one method on one batch; empty where all held."""
    first, second, broken = draw(seed, tasks)
    outputs = [
        jax.tree.map(np.asarray, program(name, tasks, options)(batch)) for batch in (first, second)
    ]
    found = {}
    for label, output in zip(("not finite", "not finite, junk"), outputs, strict=True):
        found[label] = _where(output, lambda x: ~np.isfinite(x.astype(np.float64)))
    same = [(updates, without_counts(state)) for updates, state in outputs]
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(same[0]), jax.tree.leaves(same[1]), strict=True
    ):
        # Two zeros are equal whatever their signs; NaN was reported above.
        differ = (a != b) & ~((a != a) & (b != b))
        cases = np.flatnonzero(differ.reshape(CASES, -1).any(axis=1))
        if cases.size:
            found[f"differs{jax.tree_util.keystr(path)}"] = cases.tolist()
    miscounted = (outputs[0][1].skipped != broken).any(axis=1)
    found["miscounted"] = np.flatnonzero(miscounted).tolist()
    return {label: cases for label, cases in found.items() if cases}


def _where(output, wrong):
    bad = np.zeros(CASES, bool)
    for leaf in jax.tree.leaves(output):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            bad |= wrong(leaf).reshape(CASES, -1).any(axis=1)
    return np.flatnonzero(bad).tolist()
