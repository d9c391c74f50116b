"""How good a trained network is: every item ranked for every user, and errors of predicted numbers."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from examples.studies.harness.trainer import TEST
from examples.studies.recommender.data import Dataset
from examples.studies.recommender.pairs import PairTable, pair_table

CUTOFFS = (10, 20)
METRICS = tuple(f"{name}@{k}" for k in CUTOFFS for name in ("ndcg", "recall", "precision"))
# Which items a user's held-out positives are ranked among.
PROTOCOLS = {
    "all": "all items but the user's known positives of the same task",
    "new": "items that the user is not known to have touched in any task",
}
COLUMNS = tuple(f"{metric}, {protocol}" for protocol in PROTOCOLS for metric in METRICS)
# Small enough for a cache on a CPU (a user or a few at a time), large enough to fill a GPU.
PAIRS_AT_ONCE = {"cpu": 2**13}
PAIRS_AT_ONCE_ELSEWHERE = 2**20
SCORES_AT_ONCE = 2**23  # that NumPy computes


Tables = tuple[PairTable, PairTable, PairTable]  # training, validation and test set


def pair_tables(dataset: Dataset) -> Tables:
    """The three sets as tables that are searched on the device."""
    parts = (dataset.train, dataset.validation, dataset.test)
    train, validation, test = (pair_table(part, dataset.num_users) for part in parts)
    return train, validation, test


def ranking_metrics(scores: jax.Array, hidden: jax.Array, relevant: jax.Array) -> jax.Array:
    """Metrics `[users, len(METRICS)]`; NaN for users with nothing relevant, 0 where a score is NaN.

    Args:
      scores: `[users, items]`, higher is better; ties go to the item with the lower index.
      hidden: items that are not ranked, bool `[users, items]`.
      relevant: held-out positives, bool `[users, items]`.
    """
    most = max(CUTOFFS)
    depth = min(most, scores.shape[1])
    top = jax.lax.top_k(jnp.where(hidden, -jnp.inf, scores), depth)[1]
    hits = jnp.take_along_axis(relevant, top, axis=1).astype(scores.dtype)
    hits = jnp.pad(hits, ((0, 0), (0, most - depth)))
    count = relevant.sum(axis=1).astype(scores.dtype)
    gain = 1.0 / jnp.log2(jnp.arange(most, dtype=scores.dtype) + 2.0)
    best = jnp.concatenate([jnp.zeros(1, scores.dtype), jnp.cumsum(gain)])
    columns = []
    for k in CUTOFFS:
        found = hits[:, :k].sum(axis=1)
        ideal = best[jnp.minimum(count, k).astype(jnp.int32)]
        columns += [(hits[:, :k] @ gain[:k]) / ideal, found / count, found / k]
    # Scores that are not numbers rank nothing: without this, the first items would be "the best".
    broken = jnp.isnan(scores).any(axis=1, keepdims=True)
    metrics = jnp.where(broken, 0.0, jnp.stack(columns, axis=1))
    return jnp.where(count[:, None] > 0, metrics, jnp.nan)


def metrics_of_users(
    tables: Tables, scores: jax.Array, users: jax.Array, task: jax.Array, part: jax.Array
) -> jax.Array:
    """The metrics `[users, len(COLUMNS)]` of one task's scores `[users, items]` under both protocols.

    In the test, the task's validation positives are known and not ranked either.
    """
    num_items = scores.shape[1]
    train, validation, test = (table.rows(users, num_items) for table in tables)
    relevant = jnp.where(part == TEST, test[task], validation[task])
    known = jnp.where(part == TEST, validation, False)
    of_task = train[task] | known[task]
    of_any = train.any(axis=0) | known.any(axis=0)
    found = [ranking_metrics(scores, hidden, relevant) for hidden in (of_task, of_any & ~relevant)]
    return jnp.concatenate(found, axis=1)


def rank_users(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    tables: Tables,
    num_items: int,
    users: jax.Array,
    task: jax.Array,
    part: jax.Array,
) -> jax.Array:
    """Metrics `[users, len(COLUMNS)]`, a block of users against all items at a time.

    `predict(users [n, 1], items [1, m]) -> [n, m]` scores a block.
    """
    items = jnp.arange(num_items)[None]

    def block(users: jax.Array) -> jax.Array:
        return metrics_of_users(tables, predict(users[:, None], items), users, task, part)

    pairs = PAIRS_AT_ONCE.get(jax.default_backend(), PAIRS_AT_ONCE_ELSEWHERE)
    size = max(1, min(len(users), pairs // num_items))
    blocks = -(-len(users) // size)
    padded = jnp.resize(users, (blocks, size))
    found = jax.lax.map(block, padded)
    return found.reshape(blocks * size, -1)[: len(users)]


def held_out_users(dataset: Dataset, task: int, part: int) -> np.ndarray:
    """The users who have a held-out positive of the task."""
    held_out = dataset.test if part == TEST else dataset.validation
    return np.unique(held_out.positives(task)[:, 0])


def rank_by_item_scores(
    dataset: Dataset, scores: Callable[[np.ndarray], np.ndarray], task: int = 0, part: int = TEST
) -> np.ndarray:
    """Metrics `[users, len(COLUMNS)]`, NaN for users who have nothing held out, of any scores.

    For rows of a table that train nothing: popularity, item-kNN. `scores(users [n]) -> [n, items]` is
    called with a block of users at a time.
    """
    tables = pair_tables(dataset)
    users = held_out_users(dataset, task, part)
    measure = jax.jit(partial(metrics_of_users, tables))
    found = np.full((dataset.num_users, len(COLUMNS)), np.nan, np.float32)
    blocks = -(-len(users) * dataset.num_items // SCORES_AT_ONCE)
    for block in np.array_split(users, max(1, blocks)):
        found[block] = measure(np.asarray(scores(block), np.float32), block, task, part)
    return found
