"""MetaBalance's multi-task recommender in Flax NNX: a shared bottom and one tower a task."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes as in MetaBalance's appendix A.2."""

    embedding: int = 64
    mlp: tuple[int, ...] = (32, 16, 8)
    tower: tuple[int, ...] = (64, 32)
    dropout: float = 0.0


class Perceptron(nnx.Module):
    """Dense layers, each followed by ReLU and dropout."""

    def __init__(self, size: int, widths: tuple[int, ...], dropout: float, rngs: nnx.Rngs):
        sizes = (size, *widths)
        self.layers = nnx.List(
            [nnx.Linear(a, b, rngs=rngs) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
        )
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, inputs: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        for number, layer in enumerate(self.layers):
            inputs = nnx.relu(layer(inputs))
            if dropout_key is not None:
                key = jax.random.fold_in(dropout_key, number)
                inputs = self.dropout(inputs, deterministic=False, rngs=key)
        return inputs


class SharedBottom(nnx.Module):
    """Matrix-factorisation layer (product of embeddings) beside an MLP over both embeddings."""

    def __init__(self, users: int, items: int, config: NetworkConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.embedding**-0.5)
        self.user = nnx.Embed(users, config.embedding, embedding_init=init, rngs=rngs)
        self.item = nnx.Embed(items, config.embedding, embedding_init=init, rngs=rngs)
        self.mlp = Perceptron(2 * config.embedding, config.mlp, config.dropout, rngs)

    def __call__(
        self, users: jax.Array, items: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        user, item = self.user(users), self.item(items)
        deep = self.mlp(jnp.concatenate([user, item], axis=-1), dropout_key)
        return jnp.concatenate([user * item, deep], axis=-1)


class Tower(nnx.Module):
    """The logit of one task: an MLP over the shared representation plus a bias of the item."""

    def __init__(self, items: int, config: NetworkConfig, rngs: nnx.Rngs):
        size = config.embedding + config.mlp[-1]
        self.mlp = Perceptron(size, config.tower, config.dropout, rngs)
        self.output = nnx.Linear(config.tower[-1], 1, rngs=rngs)
        self.item_bias = nnx.Embed(items, 1, embedding_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(
        self, representation: jax.Array, items: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        logit = self.output(self.mlp(representation, dropout_key)) + self.item_bias(items)
        return logit[..., 0]


class Recommender(nnx.Module):
    """Shared bottom and towers; `bottom` holds the shared parameters, `towers` the heads."""

    def __init__(
        self, users: int, items: int, tasks: int, config: NetworkConfig, rngs: nnx.Rngs
    ):
        self.bottom = SharedBottom(users, items, config, rngs)
        self.towers = nnx.List([Tower(items, config, rngs) for _ in range(tasks)])
