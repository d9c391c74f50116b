"""MetaBalance's multi-task recommender (Figure 6) in Flax NNX: a shared bottom, one tower per task."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.models import layers
from examples.models.layers import TABLE_INIT, Perceptron
from examples.studies.harness import steps
from examples.studies.harness.data import Task
from examples.studies.harness.steps import Parameters


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes; the defaults are those of MetaBalance's appendix A.2."""

    embedding: int = 64
    mlp: tuple[int, ...] = (32, 16, 8)
    tower: tuple[int, ...] = (64, 32)
    dropout: float = 0.5

    @property
    def representation(self) -> int:
        """The width of what the towers read."""
        return self.embedding + self.mlp[-1]


class Batch(NamedTuple):
    """Pairs with a label and a mask per task.

    Attributes:
      users, items: `[N]`.
      labels, mask: `[T, N]`; a pair without mask does not count in the task's loss.
      key: for dropout.
    """

    users: jax.Array
    items: jax.Array
    labels: jax.Array
    mask: jax.Array
    key: jax.Array


class Tables(NamedTuple):
    """Embeddings of users and items."""

    user: jax.Array
    item: jax.Array


class Shared(NamedTuple):
    """The parameters that all tasks share."""

    tables: Tables
    bottom: nnx.State


class SharedBottom(nnx.Module):
    """Matrix-factorisation layer (product of embeddings) beside an MLP over both embeddings.

    The first layer of the MLP reads users and items by two matrices, so that `[users, 1, size]` with
    `[1, items, size]` scores all pairs of a block without repeating that work for each pair. Dropout acts
    on the representation alone, where it regularises both halves.
    """

    def __init__(self, config: NetworkConfig, rngs: nnx.Rngs):
        # Half the variance each: together the two are one layer over both embeddings.
        half = nnx.initializers.variance_scaling(0.5, "fan_in", "uniform")
        size, width = config.embedding, config.mlp[0]
        self.from_user = nnx.Linear(size, width, kernel_init=half, rngs=rngs)
        self.from_item = nnx.Linear(size, width, kernel_init=half, use_bias=False, rngs=rngs)
        self.mlp = Perceptron(config.mlp, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self, user: jax.Array, item: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        deep = self.mlp(nnx.relu(self.from_user(user) + self.from_item(item)))
        representation = jnp.concatenate([user * item, deep], axis=-1)
        if dropout_key is None:
            return representation
        return self.dropout(representation, deterministic=False, rngs=dropout_key)


class Tower(nnx.Module):
    """The logit or number of one task: an MLP over the shared representation plus a bias of the item."""

    def __init__(self, items: int, config: NetworkConfig, rngs: nnx.Rngs):
        self.mlp = layers.Tower(config.representation, config.tower, rngs)
        self.item_bias = nnx.Param(jnp.zeros(items))

    def __call__(self, representation: jax.Array, items: jax.Array) -> jax.Array:
        return self.mlp(representation) + self.item_bias[...][items]


class Network(steps.Network):
    """The network as pure functions of its parameters, those of the towers with a first axis of tasks."""

    def __init__(
        self,
        users: int,
        items: int,
        tasks: tuple[Task, ...],
        bias: np.ndarray,
        config: NetworkConfig,
        negatives: int = 1,
    ):
        """`bias` `[T, items]` is where the towers' biases of the items start.

        A batch for a softmax has its pairs first, then `negatives` random items of each.
        """
        self.num_tasks, self.num_users, self.num_items = len(tasks), users, items
        self.config, self.negatives = config, negatives
        # The shape of one pair's: no method here keeps gradients of a whole batch.
        self.representation = jax.ShapeDtypeStruct((1, config.representation), jnp.float32)
        self._bias = jnp.asarray(bias, jnp.float32)
        self._tasks = tasks
        self._make_bottom = lambda key: SharedBottom(config, nnx.Rngs(key))
        self._make_tower = lambda key: Tower(items, config, nnx.Rngs(key))
        key = jax.random.key(0)
        self._bottom = nnx.graphdef(nnx.eval_shape(self._make_bottom, key))
        self._tower = nnx.graphdef(nnx.eval_shape(self._make_tower, key))

    def init(self, key: jax.Array) -> Parameters:
        """Fresh parameters."""
        user_key, item_key, bottom_key, tower_key = jax.random.split(key, 4)
        sizes = (user_key, self.num_users), (item_key, self.num_items)
        tables = Tables(*(TABLE_INIT(key, (n, self.config.embedding)) for key, n in sizes))
        make_state = jax.vmap(lambda key: nnx.state(self._make_tower(key)))
        heads = make_state(jax.random.split(tower_key, self.num_tasks))
        heads["item_bias"].set_value(self._bias)
        return Parameters(Shared(tables, nnx.state(self._make_bottom(bottom_key))), heads)

    def encode(self, shared: Shared, batch: Batch) -> jax.Array:
        """The representation `[N, width]` of a training batch."""
        user, item = shared.tables.user[batch.users], shared.tables.item[batch.items]
        return nnx.merge(self._bottom, shared.bottom)(user, item, batch.key)

    def losses(
        self, heads: nnx.State, copies: tuple[jax.Array, ...], batch: Batch
    ) -> tuple[jax.Array, ...]:
        """The T losses: cross-entropy, sampled softmax, or squared error in the unit of the data.

        A tuple of scalars, one task after the other: the gradient of a loss is then found without a pass
        through the other towers, which an array `[T]` would force on it.
        """
        losses = []
        for place, (task, copy) in enumerate(zip(self._tasks, copies, strict=True)):
            head = jax.tree.map(lambda leaf, place=place: leaf[place], heads)
            found = nnx.merge(self._tower, head)(copy, batch.items)
            labels, mask = batch.labels[place], batch.mask[place]
            if task.softmax:
                losses.append(sampled_softmax(found, labels, mask, self.negatives))
            else:
                losses.append(task.loss(found, labels, mask))
        return tuple(losses)

    def weigh_heads(self, head_grads: nnx.State, weights: jax.Array) -> nnx.State:
        """The gradients of the towers, which are stacked along the tasks, times their weights."""
        return jax.vmap(optax.tree.scale)(weights, head_grads)

    def predict(
        self, params: Parameters, task: int | jax.Array, users: jax.Array, items: jax.Array
    ) -> jax.Array:
        """The logit or number of one task; `users` and `items` broadcast, as `[n, 1]` and `[1, m]` do."""
        tables = params.shared.tables
        bottom = nnx.merge(self._bottom, params.shared.bottom)
        tower = nnx.merge(self._tower, jax.tree.map(lambda leaf: leaf[task], params.heads))
        return tower(bottom(tables.user[users], tables.item[items]), items)


def sampled_softmax(
    scores: jax.Array, labels: jax.Array, mask: jax.Array, negatives: int
) -> jax.Array:
    """The mean loss of the positives among the first `N / (1 + negatives)` of the scores `[N]`.

    Each competes with the random items of its pair, but for those that are positives too or are masked. The
    items are drawn uniformly, which needs no correction.
    """
    pairs = len(scores) // (1 + negatives)
    own, is_positive = scores[:pairs, None], (labels * mask)[:pairs]
    is_negative = (mask[pairs:] > 0) & (labels[pairs:] == 0)
    drawn = jnp.where(is_negative, scores[pairs:], -jnp.inf).reshape(pairs, negatives)
    each = jax.nn.logsumexp(jnp.concatenate([own, drawn], axis=1), axis=1) - own[:, 0]
    return jnp.sum(each * is_positive) / jnp.maximum(jnp.sum(is_positive), 1)
