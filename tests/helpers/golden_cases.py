"""The reference cases, and how to bring them to one shape.

Compiling is what takes the time, so the cases of a method run as one batch. Vectors are padded with
zeros, tasks with absent ones: what an absent task's slot holds must not matter, so that the padding tests
`active` on the way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def load(name: str) -> list[Any]:
    """The cases of one file of reference numbers, e.g. `load("gradient/mgda")`."""
    return json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))["cases"]


def parameters(
    name: str, keep: Callable[[Any], bool] = lambda case: True, quick: Collection[str] = ()
) -> list[Any]:
    """The cases of a file for `pytest.mark.parametrize`; if `quick` names some, the others are slow."""
    cases = [case for case in load(name) if keep(case)]
    assert set(quick) <= {case["name"] for case in cases}, quick
    return [
        pytest.param(
            case,
            id=case["name"],
            marks=pytest.mark.slow if quick and case["name"] not in quick else (),
        )
        for case in cases
    ]


# The absent tasks' slots hold this, not 0: nobody may look at it.
ABSENT = 7.0


def pad(gradients: Any, num_tasks: int, size: int) -> np.ndarray:
    """`[t, n]` as `[num_tasks, size]`."""
    given = np.asarray(gradients, float)
    padded = np.zeros((num_tasks, size))
    padded[: given.shape[0], : given.shape[1]] = given
    padded[given.shape[0] :] = ABSENT
    return padded


def pad_vector(vector: Any, num_tasks: int, fill: float = 0.0) -> np.ndarray:
    """`[t]` as `[num_tasks]`."""
    given = np.asarray(vector, float)
    return np.concatenate([given, np.full(num_tasks - len(given), fill)])


def pad_order(order: Any, num_tasks: int) -> np.ndarray:
    """`[t, t]` orders as `[num_tasks, num_tasks]`, the absent tasks met last."""
    given = np.asarray(order, int)
    padded = np.tile(np.arange(num_tasks), (num_tasks, 1))
    padded[: len(given), : len(given)] = given
    return padded


def present(counts: Sequence[int], num_tasks: int) -> np.ndarray:
    """Which tasks are real, bool `[cases, num_tasks]`."""
    return np.arange(num_tasks)[None, :] < np.asarray(counts)[:, None]


class Batch:
    """Static cases as one batch."""

    def __init__(self, gradients: Sequence[Any]) -> None:
        self.counts = [len(g) for g in gradients]
        self.sizes = [len(g[0]) for g in gradients]
        self.num_tasks = max(self.counts)
        self.active = present(self.counts, self.num_tasks)
        self.gradients = np.stack([pad(g, self.num_tasks, max(self.sizes)) for g in gradients])
        self.largest = [np.linalg.norm(np.asarray(g), axis=1).max() for g in gradients]

    def run(
        self, make: Callable[..., Any], dtype: Any = jnp.float64, keywords: Any = None, **extra: Any
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Updates and weights of `make(num_tasks, **keywords)`, one step from a fresh state each.

        `keywords` and `extra` map names to stacked arrays, an entry a case.
        """

        def one(g: jax.Array, active: jax.Array, keywords: Any, extra: Any) -> Any:
            method = make(self.num_tasks, **keywords)
            params = jnp.zeros(g.shape[1:], g.dtype)
            update, state = method.update(g, method.init(params), params, active=active, **extra)
            return update, state.weights[0]

        def cast(x: Any) -> jax.Array:
            x = jnp.asarray(x)
            return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        args = jax.tree.map(cast, (self.gradients, keywords or {}, extra))
        updates, weights = jax.jit(jax.vmap(one))(args[0], jnp.asarray(self.active), *args[1:])
        return (
            [np.asarray(u, float)[:n] for u, n in zip(updates, self.sizes, strict=True)],
            [np.asarray(w, float)[:t] for w, t in zip(weights, self.counts, strict=True)],
        )


class Trajectory(NamedTuple):
    """What a method did in many sequences, `[cases, steps, ...]`; states without the axis of one block."""

    updates: np.ndarray
    weights: np.ndarray
    rule_state: Any


def run_sequence(
    make: Callable[..., Any],
    gradients: Any,
    active: Any,
    keywords: Any = None,
    extra: Any = None,
) -> Trajectory:
    """Runs many sequences `[cases, steps, T, n]` at once; `keywords` and `extra` as in `Batch.run`."""

    def one(sequence: jax.Array, active: jax.Array, keywords: Any, extra: Any) -> Any:
        method = make(sequence.shape[1], **keywords)

        def step(state: Any, inputs: Any) -> tuple[Any, Any]:
            g, given = inputs
            update, state = method.update(g, state, active=active, **given)
            first = jax.tree.map(lambda x: x[0], (state.weights, state.rule_state))
            return state, (update, *first)

        start = method.init(jnp.zeros(sequence.shape[2:], sequence.dtype))
        return jax.lax.scan(step, start, (sequence, extra))[1]

    arrays = jax.tree.map(jnp.asarray, (gradients, active, keywords or {}, extra or {}))
    return Trajectory(*jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(*arrays)))


def pad_sequences(sequences: Sequence[Sequence[Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of `[t, n]` as `[cases, steps, T, n]` (later steps are zeros) and `active`."""
    counts = [len(sequence[0]) for sequence in sequences]
    num_tasks, steps = max(counts), max(map(len, sequences))
    size = max(len(sequence[0][0]) for sequence in sequences)
    result = np.zeros((len(sequences), steps, num_tasks, size))
    for i, sequence in enumerate(sequences):
        for k, g in enumerate(sequence):
            result[i, k] = pad(g, num_tasks, size)
    return result, present(counts, num_tasks)


def error(got: Any, want: Any, largest: float = 0.0) -> float:
    """Largest difference relative to the largest expected entry.

    An expected result that vanishes next to the `largest` gradient norm is compared with that norm.
    """
    got, want = np.asarray(got, float), np.asarray(want, float)
    scale = np.abs(want).max(initial=0)
    if scale <= 1e-9 * largest:
        scale = largest
    return float(np.abs(got - want).max(initial=0) / (scale or 1))
