"""MetaBalance's multi-task recommender in Flax NNX: a shared bottom and one tower per task."""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

# Uniform rather than truncated normal: the same variance, and much less to compile.
KERNEL_INIT = nnx.initializers.lecun_uniform()


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes as in MetaBalance's appendix A.2."""

    embedding: int = 64
    mlp: tuple[int, ...] = (32, 16, 8)
    tower: tuple[int, ...] = (64, 32)
    dropout: float = 0.5


class Perceptron(nnx.Module):
    """Dense layers, each followed by ReLU."""

    def __init__(self, size: int, widths: tuple[int, ...], rngs: nnx.Rngs):
        sizes = (size, *widths)
        self.layers = nnx.List(
            [
                nnx.Linear(fan_in, fan_out, kernel_init=KERNEL_INIT, rngs=rngs)
                for fan_in, fan_out in itertools.pairwise(sizes)
            ]
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        for layer in self.layers:
            inputs = nnx.relu(layer(inputs))
        return inputs


class SharedBottom(nnx.Module):
    """Matrix-factorisation layer (product of embeddings) beside an MLP over both embeddings.

    Dropout acts on the representation alone, where it regularises both halves.
    """

    def __init__(self, users: int, items: int, config: NetworkConfig, rngs: nnx.Rngs):
        # Small: what the embeddings start with is noise, which Adam outgrows in a few steps.
        init = nnx.initializers.variance_scaling(0.01, "fan_out", "uniform")
        self.user = nnx.Embed(users, config.embedding, embedding_init=init, rngs=rngs)
        self.item = nnx.Embed(items, config.embedding, embedding_init=init, rngs=rngs)
        self.mlp = Perceptron(2 * config.embedding, config.mlp, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self, users: jax.Array, items: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        user, item = self.user(users), self.item(items)
        deep = self.mlp(jnp.concatenate([user, item], axis=-1))
        representation = jnp.concatenate([user * item, deep], axis=-1)
        if dropout_key is None:
            return representation
        return self.dropout(representation, deterministic=False, rngs=dropout_key)


class Tower(nnx.Module):
    """The logit of one task: an MLP over the shared representation plus a bias of the item."""

    def __init__(self, items: int, config: NetworkConfig, rngs: nnx.Rngs):
        size = config.embedding + config.mlp[-1]
        self.mlp = Perceptron(size, config.tower, rngs)
        self.output = nnx.Linear(config.tower[-1], 1, kernel_init=KERNEL_INIT, rngs=rngs)
        self.item_bias = nnx.Embed(items, 1, embedding_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, representation: jax.Array, items: jax.Array) -> jax.Array:
        logit = self.output(self.mlp(representation)) + self.item_bias(items)
        return logit[..., 0]
