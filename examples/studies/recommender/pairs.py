"""Labels of (user, item) pairs on the device, in memory that grows with the pairs alone.

A dense table `[users, items]` of UserBehavior-2017 would take 1.9 GB; sorted pairs take 8 bytes each and
a binary search.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from examples.studies.recommender.data import Interactions


class PairTable(struct.PyTreeNode):
    """Pairs sorted by user, then by item.

    Attributes:
      starts: `[users + 1]`; the pairs of user `u` are `starts[u]` to `starts[u + 1]`.
      items: `[P]`.
      values: `[P, T]`.
      longest: the largest number of pairs of a user, at least 1.
    """

    starts: jax.Array
    items: jax.Array
    values: jax.Array
    longest: int = struct.field(pytree_node=False)

    def find(self, users: jax.Array, items: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The labels `[N, T]` of pairs (0 for a pair that is not here), and whether it is, `[N]`."""
        low, end = self.starts[users], self.starts[users + 1]
        high = end
        for _ in range(self.longest.bit_length()):
            middle = (low + high) // 2
            smaller = (low < high) & (jnp.take(self.items, middle, mode="clip") < items)
            low, high = jnp.where(smaller, middle + 1, low), jnp.where(smaller, high, middle)
        found = (low < end) & (jnp.take(self.items, low, mode="clip") == items)
        values = jnp.take(self.values, low, axis=0, mode="clip")
        return jnp.where(found[:, None], values, 0), found

    def rows(self, users: jax.Array, num_items: int) -> jax.Array:
        """For each of `users`, which items are here and positive for each task: bool `[T, N, items]`."""
        position = self.starts[users][:, None] + jnp.arange(self.longest)[None]
        inside = position < self.starts[users + 1][:, None]
        # Positions past the user's last pair are sent outside the table and dropped.
        items = jnp.where(inside, jnp.take(self.items, position, mode="clip"), num_items)
        positive = jnp.moveaxis(jnp.take(self.values, position, axis=0, mode="clip") > 0, -1, 0)
        empty = jnp.zeros((self.values.shape[1], len(users), num_items), bool)
        return empty.at[:, jnp.arange(len(users))[:, None], items].set(positive, mode="drop")


def pair_table(interactions: Interactions, num_users: int) -> PairTable:
    """The table of sorted, distinct pairs."""
    counts = np.bincount(interactions.pairs[:, 0], minlength=num_users)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    items = jnp.asarray(interactions.pairs[:, 1])
    longest = max(1, int(counts.max(initial=0)))
    return PairTable(jnp.asarray(starts), items, jnp.asarray(interactions.values), longest)
