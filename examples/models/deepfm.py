"""DeepFM with one tower per task (Guo et al., DeepFM, IJCAI 2017).

    represent: numerical and categorical -> fields [batch, F + C, k + 1] -> interaction (FM, deep)
    head(t):   representation [batch, 1 + k + deep[-1]] -> tower t -> logit [batch]

Field i is the vector v_i and the first-order weight w_i of its value; those of a number x are x v_i and
x w_i. The paper's FM term is one number, sum_i w_i + sum_{i<j} <v_i, v_j>. The towers of several tasks
need more to choose from, so the representation keeps sum_i w_i and the k entries of sum_{i<j} v_i * v_j
apart: their sum is the FM term. `numerical`, `categorical` and `interaction` are the modules whose
parameters Table 2 of MultiBalance's paper balances.

Parameters with `FeatureSpec(3, (10, 20))`, two tasks and the defaults: 24,499.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from examples.models.layers import (
    TABLE_INIT,
    Features,
    FeatureSpec,
    Perceptron,
    Tables,
    TabularModel,
    Tower,
    flatten_rows,
)


class NumericalFields(nnx.Module):
    """A vector per number, times the number: `[batch, F]` to `[batch, F, width]`."""

    def __init__(self, number: int, width: int, rngs: nnx.Rngs):
        self.vectors = nnx.Param(TABLE_INIT(rngs.params(), (number, width)))

    def __call__(self, numbers: jax.Array) -> jax.Array:
        return numbers[:, :, None] * self.vectors[...][None]


class Interaction(nnx.Module):
    """FM beside a perceptron: fields `[batch, n, k + 1]` to `[batch, 1 + k + deep[-1]]`."""

    def __init__(self, fields: int, embedding: int, deep: tuple[int, ...], rngs: nnx.Rngs):
        self.deep = Perceptron((fields * embedding, *deep), rngs)

    def __call__(self, fields: jax.Array) -> jax.Array:
        vectors, first_order = fields[..., :-1], fields[..., -1]
        # sum_{i<j} v_i * v_j = ((sum_i v_i)^2 - sum_i v_i^2) / 2, in time linear in the number of fields.
        pairs = (jnp.sum(vectors, axis=1) ** 2 - jnp.sum(vectors**2, axis=1)) / 2
        first = jnp.sum(first_order, axis=1, keepdims=True)
        return jnp.concatenate([first, pairs, self.deep(flatten_rows(vectors))], axis=1)


class DeepFM(TabularModel):
    """Logits `[T, batch]` from `Features`.

    Args:
      features: the columns. Without numbers the module `numerical` is None.
      num_tasks: T.
      embedding: k, the width of the vectors.
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
        deep: tuple[int, ...] = (128, 64),
        tower: tuple[int, ...] = (32,),
        rngs: nnx.Rngs,
    ):
        self.num_tasks = num_tasks
        number = features.num_numerical + len(features.vocabulary_sizes)
        self.numerical = nnx.data(None)
        if features.num_numerical:
            self.numerical = NumericalFields(features.num_numerical, embedding + 1, rngs)
        self.categorical = Tables(features, embedding + 1, rngs)
        self.interaction = Interaction(number, embedding, deep, rngs)
        width = 1 + embedding + deep[-1]
        self.towers = nnx.List(Tower(width, tower, rngs) for _ in range(num_tasks))

    def represent(self, features: Features) -> jax.Array:
        """The parts of the FM term beside the deep features, `[batch, 1 + k + deep[-1]]`."""
        fields = self.categorical(features.categorical)
        if self.numerical is not None:
            fields = jnp.concatenate([self.numerical(features.numerical), fields], axis=1)
        return self.interaction(fields)
