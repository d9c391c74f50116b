"""NDCG@10 of held-out pairs by counting higher scores: no sort, which is slow for many runs at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.studies.harness.trainer import TEST
from examples.studies.recommender.data import Dataset, Interactions

CUTOFF = 10


class HeldOut(NamedTuple):
    """The held-out positives of the target, sorted by user.

    Attributes:
      users, items: `[P]`.
      places: `[P]`, of the user among those who have some.
      hidden: bool `[2, P, I]`, the items that are not ranked, by protocol.
      ideal: `[held-out users]`, the best gain.
    """

    users: jax.Array
    items: jax.Array
    places: jax.Array
    hidden: jax.Array
    ideal: jax.Array


def held_out(dataset: Dataset, part: int) -> HeldOut:
    """The pairs of a set, with the two protocols of `recommender.evaluation`."""
    size = dataset.num_users, dataset.num_items

    def table(found: Interactions, *, any_task: bool) -> np.ndarray:
        made = np.zeros(size, bool)
        made[tuple((found.pairs if any_task else found.positives(0)).T)] = True
        return made

    users, items = (dataset.test if part == TEST else dataset.validation).positives(0).T
    _, places, counts = np.unique(users, return_inverse=True, return_counts=True)
    relevant = np.zeros(size, bool)
    relevant[users, items] = True
    sets = (dataset.train, dataset.validation) if part == TEST else (dataset.train,)
    of_task, of_any = (
        np.any([table(found, any_task=either) for found in sets], axis=0)
        for either in (False, True)
    )
    hidden = np.stack([of_task[users], (of_any & ~relevant)[users]])
    gains = np.cumsum(1 / np.log2(np.arange(CUTOFF) + 2))
    ideal = gains[np.minimum(counts, CUTOFF) - 1]
    return HeldOut(*map(jnp.asarray, (users, items, places, hidden, ideal)))


def ndcg(scores: jax.Array, pairs: HeldOut) -> jax.Array:
    """NDCG@10 `[held-out users, 2]` of scores `[P, I]`; NaN ranks last, ties go to the lower index."""
    own = jnp.take_along_axis(scores, pairs.items[:, None], axis=1)
    earlier = jnp.arange(scores.shape[1])[None] < pairs.items[:, None]
    above = ~(scores <= own) | ((scores == own) & earlier)
    rank = jnp.sum(above[None] & ~pairs.hidden, axis=2)  # from 0
    gain = jnp.where(rank < CUTOFF, 1 / jnp.log2(rank + 2.0), 0.0)
    total = jnp.zeros((2, len(pairs.ideal))).at[:, pairs.places].add(gain)
    return (total / pairs.ideal[None]).T
