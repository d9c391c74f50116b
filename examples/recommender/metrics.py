"""NDCG, recall and precision at k with every item ranked, on the device."""

import jax
import jax.numpy as jnp
import numpy as np

CUTOFFS = (10, 20)
METRICS = tuple(f"{name}@{k}" for k in CUTOFFS for name in ("ndcg", "recall", "precision"))


def ranking_metrics(scores: jax.Array, known: jax.Array, relevant: jax.Array) -> jax.Array:
    """Metrics `[users, len(METRICS)]` of scores `[users, items]`; NaN for users with nothing relevant.

    Args:
        scores: higher is better; ties go to the item with the lower index.
        known: items not to be ranked (the user's training positives), bool `[users, items]`.
        relevant: held-out positives, bool `[users, items]`.
    """
    depth = min(max(CUTOFFS), scores.shape[1])
    top = jax.lax.top_k(jnp.where(known, -jnp.inf, scores), depth)[1]
    hits = jnp.take_along_axis(relevant, top, axis=1).astype(scores.dtype)
    hits = jnp.pad(hits, ((0, 0), (0, max(CUTOFFS) - depth)))
    count = relevant.sum(axis=1).astype(scores.dtype)
    gain = 1.0 / jnp.log2(jnp.arange(max(CUTOFFS), dtype=scores.dtype) + 2.0)
    best = jnp.concatenate([jnp.zeros(1, scores.dtype), jnp.cumsum(gain)])
    columns = []
    for k in CUTOFFS:
        found = hits[:, :k].sum(axis=1)
        ideal = best[jnp.minimum(count, k).astype(jnp.int32)]
        columns += [(hits[:, :k] @ gain[:k]) / ideal, found / count, found / k]
    return jnp.where(count[:, None] > 0, jnp.stack(columns, axis=1), jnp.nan)


@jax.jit
def table_metrics(
    scores: jax.Array, labels: jax.Array, held_out: jax.Array, part: int | jax.Array
) -> jax.Array:
    """Metrics from the rows of `Dataset.labels` and `held_out`: part 1 is validation, 2 is test.

    The target's training positives are not ranked, and in the test neither are its validation ones.
    """
    known = (labels & 1).astype(bool) | ((held_out > 0) & (held_out < part))
    return ranking_metrics(scores, known, held_out == part)


def popularity(labels: np.ndarray, held_out: np.ndarray, part: int = 2) -> np.ndarray:
    """The floor: every user gets the items with the most target pairs in the training set."""
    counts = (labels & 1).sum(axis=0, dtype=np.float32)
    rows = []
    for start in range(0, len(labels), 1024):  # in chunks: the score table of all users is large
        chunk = slice(start, start + 1024)
        scores = jnp.broadcast_to(counts, labels[chunk].shape)
        rows.append(np.asarray(table_metrics(scores, labels[chunk], held_out[chunk], part)))
    return np.concatenate(rows)
