"""DCN-v2 with one tower per task (Wang et al., DCN V2, The Web Conference 2021).

    represent: numerical (perceptron) and categorical (tables) -> x0 [batch, D] -> interaction (cross, deep)
    head(t):   representation [batch, D + deep[-1]] -> tower t -> logit [batch]

A cross layer is x_{l+1} = x_0 * (W x_l + b) + x_l, with W of full rank or a product of two matrices. The
cross network and the deep one stand side by side on x_0, which the paper calls the parallel structure.
`numerical`, `categorical` and `interaction` are the modules whose parameters Table 2 of MultiBalance's
paper balances.

Parameters with `FeatureSpec(3, (10, 20))`, two tasks and the defaults: 36,034.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from examples.models.layers import (
    KERNEL_INIT,
    Features,
    FeatureSpec,
    Perceptron,
    Tables,
    TabularModel,
    Tower,
    flatten_rows,
)


class CrossLayer(nnx.Module):
    """x_0 * (W x + b) + x for vectors `[batch, width]`; with `rank`, W = U V."""

    def __init__(self, width: int, rank: int | None, rngs: nnx.Rngs):
        self.down = nnx.data(None)
        if rank is not None:
            self.down = nnx.Linear(width, rank, use_bias=False, kernel_init=KERNEL_INIT, rngs=rngs)
        self.linear = nnx.Linear(rank or width, width, kernel_init=KERNEL_INIT, rngs=rngs)

    def __call__(self, first: jax.Array, inputs: jax.Array) -> jax.Array:
        narrow = inputs if self.down is None else self.down(inputs)
        return first * self.linear(narrow) + inputs


class Interaction(nnx.Module):
    """The cross network beside the deep one: `[batch, D]` to `[batch, D + deep[-1]]`."""

    def __init__(
        self, width: int, layers: int, rank: int | None, deep: tuple[int, ...], rngs: nnx.Rngs
    ):
        self.cross = nnx.List(CrossLayer(width, rank, rngs) for _ in range(layers))
        self.deep = Perceptron((width, *deep), rngs)

    def __call__(self, first: jax.Array) -> jax.Array:
        crossed = first
        for layer in self.cross:
            crossed = layer(first, crossed)
        return jnp.concatenate([crossed, self.deep(first)], axis=1)


class DCNv2(TabularModel):
    """Logits `[T, batch]` from `Features`.

    Args:
      features: the columns. Without numbers the module `numerical` is None.
      num_tasks: T.
      embedding: the width of the embedding tables.
      numerical: the widths of the perceptron that reads the numbers.
      cross_layers: how many cross layers.
      rank: of the matrices of the cross layers; None for full rank.
      deep: the widths of the deep network.
      tower: the hidden widths of each tower.
      rngs: for the first values of the parameters.
    """

    def __init__(
        self,
        features: FeatureSpec,
        num_tasks: int,
        *,
        embedding: int = 16,
        numerical: tuple[int, ...] = (64, 32),
        cross_layers: int = 2,
        rank: int | None = None,
        deep: tuple[int, ...] = (128, 64),
        tower: tuple[int, ...] = (32,),
        rngs: nnx.Rngs,
    ):
        self.num_tasks = num_tasks
        width = len(features.vocabulary_sizes) * embedding
        self.numerical = nnx.data(None)
        if features.num_numerical:
            self.numerical = Perceptron((features.num_numerical, *numerical), rngs)
            width += numerical[-1]
        self.categorical = Tables(features, embedding, rngs)
        self.interaction = Interaction(width, cross_layers, rank, deep, rngs)
        self.towers = nnx.List(Tower(width + deep[-1], tower, rngs) for _ in range(num_tasks))

    def represent(self, features: Features) -> jax.Array:
        """The crossed features beside the deep ones, `[batch, D + deep[-1]]`."""
        embedded = flatten_rows(self.categorical(features.categorical))
        if self.numerical is not None:
            embedded = jnp.concatenate([self.numerical(features.numerical), embedded], axis=1)
        return self.interaction(embedded)
