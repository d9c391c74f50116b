"""Reference cases brought to one shape, so that a method compiles once for all of them.

Vectors are padded with zeros, tasks with absent ones: what an absent task's slot holds must not matter,
so that the padding tests `active` on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_optax.from_rule import Evidence, rule_of
from mtl_optax.solvers.cosine import cosine_matrix

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

        Runs the method's rule on the Gram matrix, without the pytree around it: compiling T-fold
        unrolled code for every method is what would take the time. `keywords` and `extra` map names to
        stacked arrays, an entry a case; `losses` among `extra` are the losses.
        """

        def one(g: jax.Array, active: jax.Array, keywords: Any, extra: Any) -> Any:
            rule = rule_of("test", make(self.num_tasks, **keywords))
            g = jnp.where(active[:, None], g, 0)
            cosine, norms = cosine_matrix(jnp.matmul(g, g.T, precision="highest"), active)
            losses = extra.get("losses")
            given = {name: extra.get(name) for name in rule.extra}
            step = jnp.zeros((), jnp.int32)
            evidence = Evidence(active, step, losses, norms, cosine, given)
            weights, _ = rule.weigh(evidence, rule.init(g.dtype))
            weights = jnp.where(active, weights, 0).astype(g.dtype)
            return jnp.matmul(weights, g, precision="highest"), weights

        def cast(x: Any) -> jax.Array:
            x = jnp.asarray(x)
            return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        args = jax.tree.map(cast, (self.gradients, keywords or {}, extra))
        updates, weights = jax.jit(jax.vmap(one))(args[0], jnp.asarray(self.active), *args[1:])
        return (
            [np.asarray(u, float)[:n] for u, n in zip(updates, self.sizes, strict=True)],
            [np.asarray(w, float)[:t] for w, t in zip(weights, self.counts, strict=True)],
        )


def run_sequence(
    make: Callable[..., Any],
    gradients: Any,
    active: Any,
    keywords: Any = None,
    extra: Any = None,
) -> tuple[np.ndarray, Any]:
    """All updates, and the states after them, of many sequences `[cases, steps, T, n]` at once."""

    def one(sequence: jax.Array, active: jax.Array, keywords: Any, extra: Any) -> Any:
        transformation = make(sequence.shape[1], **keywords)

        def step(state: Any, inputs: Any) -> tuple[Any, Any]:
            g, given = inputs
            update, state = transformation.update(g, state, active=active, **given)
            return state, (update, state)

        start = transformation.init(jnp.zeros(sequence.shape[2:], sequence.dtype))
        return jax.lax.scan(step, start, (sequence, extra))[1]

    arrays = jax.tree.map(jnp.asarray, (gradients, active, keywords or {}, extra or {}))
    updates, states = jax.jit(jax.vmap(one))(*arrays)
    return np.asarray(updates), jax.tree.map(np.asarray, states)


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
