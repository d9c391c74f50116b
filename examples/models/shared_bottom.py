"""Shared bottom: one perceptron for all tasks, one tower per task (Caruana, Multitask Learning, 1997).

    represent: numbers and embeddings -> perceptron -> representation [batch, bottom[-1]]
    head(t):   representation -> tower t -> logit [batch]

Parameters with `FeatureSpec(3, (10, 20))`, two tasks and the defaults: 17,570.
"""

import jax
from flax import nnx

from examples.models.layers import Features, FeatureSpec, Inputs, Perceptron, TabularModel, Tower


class SharedBottom(TabularModel):
    """Logits `[T, batch]` from `Features`.

    Args:
      features: the columns.
      num_tasks: T.
      bottom: the widths of the shared perceptron.
      embedding: the width of the embedding tables.
      tower: the hidden widths of each tower.
      rngs: for the first values of the parameters.
    """

    def __init__(
        self,
        features: FeatureSpec,
        num_tasks: int,
        *,
        bottom: tuple[int, ...] = (128, 64),
        embedding: int = 16,
        tower: tuple[int, ...] = (32,),
        rngs: nnx.Rngs,
    ):
        self.num_tasks = num_tasks
        self.inputs = Inputs(features, embedding, rngs)
        self.bottom = Perceptron((self.inputs.width, *bottom), rngs)
        self.towers = nnx.List(Tower(bottom[-1], tower, rngs) for _ in range(num_tasks))

    def represent(self, features: Features) -> jax.Array:
        """The output of the perceptron, `[batch, bottom[-1]]`."""
        return self.bottom(self.inputs(features))
