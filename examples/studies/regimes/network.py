"""An item-item network: a user is what she touched, and no item speaks for itself.

With h the user's history over all behaviours (1 for each item, over the root of their number), E and V two
tables of item vectors, and a scale a_t and item biases b_t of each task, the score of item i for task t is

    s_t(i) = sum over j != i of h_j <E_j, a_t * V_i>  +  b_t(i).

Without j = i the score of a training positive is what it would be if the pair were held out: an
autoencoder would learn the identity instead. Dropout acts on the user's vector.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from examples.studies.harness import steps
from examples.studies.harness.steps import Parameters
from examples.studies.regimes.regimes import Knobs, task_loss

TABLE_SCALE = 0.05


class Batch(NamedTuple):
    """Users with all items.

    Attributes:
      known: `[B, I]`, 1 for the items that the user touched in any behaviour, else 0.
      labels: bool `[levels, T, B, I]`, the positives with the auxiliaries' permuted at each of the levels.
      key: for dropout.
    """

    known: jax.Array
    labels: jax.Array
    key: jax.Array


class Shared(NamedTuple):
    """The item vectors `[I, d]` of histories (E) and of scored items (V)."""

    read: jax.Array
    scored: jax.Array


class Representation(NamedTuple):
    """What the heads read: users `[B, d]`, and the item vectors for the scores and what they leave out."""

    user: jax.Array
    items: Shared


class Heads(NamedTuple):
    """`scale` `[T, d]` and `bias` `[T, I]`."""

    scale: jax.Array
    bias: jax.Array


class Network(steps.Network):
    """The network under one regime, whose numbers may be traced."""

    def __init__(self, bias: jax.Array, size: int, batch: int, dropout: float, knobs: Knobs):
        """`bias` `[T, I]` is where the heads' biases start; `size` is d."""
        self.num_tasks, self._items = bias.shape
        self._bias, self._size, self._dropout, self._knobs = bias, size, dropout, knobs
        item = jax.ShapeDtypeStruct((self._items, size), jnp.float32)
        user = jax.ShapeDtypeStruct((batch, size), jnp.float32)
        self.representation = Representation(user, Shared(item, item))

    def init(self, key: jax.Array) -> Parameters:
        """Fresh parameters."""
        shape = self._items, self._size
        tables = (TABLE_SCALE * jax.random.normal(each, shape) for each in jax.random.split(key))
        heads = Heads(jnp.ones((self.num_tasks, self._size)), jnp.asarray(self._bias))
        return Parameters(Shared(*tables), heads)

    def encode(self, shared: Shared, batch: Batch) -> Representation:
        """The vectors of users and items."""
        return Representation(history(batch.known) @ shared.read, shared)

    def losses(
        self, heads: Heads, copies: tuple[Representation, ...], batch: Batch
    ) -> tuple[jax.Array, ...]:
        """The T losses of the regime."""
        labels = batch.labels[jnp.asarray(self._knobs.level, int)]
        kept = jax.random.bernoulli(batch.key, 1 - self._dropout, copies[0].user.shape)
        mask = kept / (1 - self._dropout)
        found = []
        for task, copy in enumerate(copies):
            head = jax.tree.map(lambda leaf, task=task: leaf[task], heads)
            logits = scores(head, copy, batch.known, mask)
            found.append(task_loss(logits, batch.known, labels, task, self._knobs))
        return tuple(found)

    def weigh_heads(self, head_grads: Heads, weights: jax.Array) -> Heads:
        """The gradients of the heads times their weights."""
        return jax.tree.map(lambda grad: grad * weights[:, None], head_grads)


def history(known: jax.Array) -> jax.Array:
    """The weights `[B, I]` of the items that a user touched."""
    return known / jnp.sqrt(jnp.maximum(known.sum(axis=1, keepdims=True), 1))


def scores(head: Any, copy: Representation, known: jax.Array, mask: jax.Array) -> jax.Array:
    """One task's logits `[B, I]`, with a dropout mask `[B, d]`."""
    scored = copy.items.scored * head.scale[None]
    itself = mask @ (copy.items.read * scored).T  # <E_i, a * V_i> for each user's mask
    return (copy.user * mask) @ scored.T - history(known) * itself + head.bias[None]


def predict(params: Parameters, known: jax.Array, task: int) -> jax.Array:
    """One task's scores `[B, I]` of trained parameters."""
    head = jax.tree.map(lambda leaf: leaf[task], params.heads)
    user = history(known) @ params.shared.read
    return scores(head, Representation(user, params.shared), known, jnp.ones_like(user))
