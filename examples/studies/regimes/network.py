"""An item-item network: a user is what she touched, and no item speaks for itself.

With h the user's history over all behaviours (1 for each item, over the root of their number), E and V two
tables of item vectors, and a scale a_t and item biases b_t of each task, the score of item i for task t is

    s_t(i) = 20 * sum over j != i of h_j <E_j, a_t * V_i>  +  b_t(i).

Without j = i the score of a training positive is what it would be if the pair were held out: an
autoencoder would learn the identity instead. Both tables start from `item_vectors`, where the sum is
item-kNN with all neighbours and cosines of low rank, and training goes on from there. The 20 makes it
as large as the biases, which start from the logarithms of popularity.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.sparse.linalg import svds

from examples.studies.harness import steps
from examples.studies.harness.steps import Parameters
from examples.studies.regimes.regimes import Knobs, has, task_loss

SCALE = 20.0


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
    """The network under one regime; a batch is rows of `regimes.label_codes`."""

    def __init__(
        self,
        vectors: np.ndarray,
        bias: np.ndarray,
        batch: int,
        kinds: tuple[str, str],
        knobs: Knobs | None = None,
    ):
        """`vectors` `[I, d]` and `bias` `[T, I]` are where the tables and the biases start."""
        self.num_tasks = len(bias)
        self._vectors, self._bias, self._knobs = vectors, bias, knobs
        self._kinds = kinds[:1] + kinds[1:] * (self.num_tasks - 1)
        item = jax.ShapeDtypeStruct(vectors.shape, jnp.float32)
        user = jax.ShapeDtypeStruct((batch, vectors.shape[1]), jnp.float32)
        self.representation = Representation(user, Shared(item, item))

    def init(self, key: jax.Array) -> Parameters:
        """The same parameters for every key: runs differ in the order of the users alone."""
        del key
        scale = jnp.ones((self.num_tasks, self._vectors.shape[1]))
        vectors = jnp.asarray(self._vectors, jnp.float32)
        return Parameters(Shared(vectors, vectors), Heads(scale, jnp.asarray(self._bias)))

    def encode(self, shared: Shared, batch: jax.Array) -> Representation:
        """The vectors of users and items."""
        return Representation(history(batch, self.num_tasks) @ shared.read, shared)

    def losses(
        self, heads: Heads, copies: tuple[Representation, ...], batch: jax.Array
    ) -> tuple[jax.Array, ...]:
        """The T losses of the regime."""
        weights, found = history(batch, self.num_tasks), []
        for task, copy in enumerate(copies):
            head = jax.tree.map(lambda leaf, task=task: leaf[task], heads)
            positive = has(batch, task, self.num_tasks, self._knobs.level)
            logits = scores(head, copy, weights)
            loss = task_loss(logits, weights > 0, positive, self._kinds[task], self._knobs)
            found.append(loss * self._knobs.unit if task > 0 else loss)
        return tuple(found)

    def weigh_heads(self, head_grads: Heads, weights: jax.Array) -> Heads:
        """The gradients of the heads times their weights."""
        return jax.tree.map(lambda grad: grad * weights[:, None], head_grads)


def item_vectors(known: np.ndarray, size: int) -> np.ndarray:
    """Vectors `[I, d]` whose products are the cosines of the items in `known` `[U, I]`, at rank d."""
    norms = np.sqrt(np.maximum(known.sum(axis=0), 1))
    start = np.ones(min(known.shape))  # a fixed one, so that the vectors are always the same
    _, values, right = svds(sparse.csr_array(known / norms), size, v0=start)
    return (right.T * values).astype(np.float32)


def history(codes: jax.Array, num_tasks: int) -> jax.Array:
    """The weights `[B, I]` of the items that a user touched."""
    known = ((codes & (2**num_tasks - 1)) > 0).astype(jnp.float32)
    return known / jnp.sqrt(jnp.maximum(known.sum(axis=1, keepdims=True), 1))


def scores(head: Any, copy: Representation, weights: jax.Array) -> jax.Array:
    """One task's logits `[B, I]` of users with `history` `weights`."""
    scored = copy.items.scored * (SCALE * head.scale[None])
    itself = jnp.sum(copy.items.read * scored, axis=1)  # <E_i, a * V_i>
    return copy.user @ scored.T - weights * itself[None] + head.bias[None]


def predict(params: Parameters, codes: jax.Array, task: int) -> jax.Array:
    """One task's scores `[B, I]` of trained parameters."""
    head = jax.tree.map(lambda leaf: leaf[task], params.heads)
    weights = history(codes, len(params.heads.bias))
    return scores(head, Representation(weights @ params.shared.read, params.shared), weights)
