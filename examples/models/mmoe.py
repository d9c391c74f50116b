"""MMoE: experts for all tasks, mixed by one gate per task (Ma et al., MMoE, KDD 2018).

    represent: numbers and embeddings -> inputs [batch, D] -> experts [batch, E, width]
    head(t):   softmax(gate t of inputs) mixes the experts -> tower t -> logit [batch]

The gates read the inputs too, so these are part of the representation: everything that a task takes from
the shared parameters goes through it.

Parameters with `FeatureSpec(3, (10, 20))`, two tasks and the defaults: 23,698.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.models.layers import (
    KERNEL_INIT,
    Features,
    FeatureSpec,
    Inputs,
    Perceptron,
    TabularModel,
    Tower,
)


class Representation(NamedTuple):
    """The experts' outputs `[batch, E, width]`, and what the experts and the gates read, `[batch, D]`."""

    experts: jax.Array
    inputs: jax.Array


class MMoE(TabularModel):
    """Logits `[T, batch]` from `Features`.

    Args:
      features: the columns.
      num_tasks: T.
      embedding: the width of the embedding tables.
      experts: E, the number of experts.
      expert: the widths of each expert.
      tower: the hidden widths of each tower.
      rngs: for the first values of the parameters.
    """

    def __init__(
        self,
        features: FeatureSpec,
        num_tasks: int,
        *,
        embedding: int = 16,
        experts: int = 8,
        expert: tuple[int, ...] = (64,),
        tower: tuple[int, ...] = (32,),
        rngs: nnx.Rngs,
    ):
        self.num_tasks = num_tasks
        self.inputs = Inputs(features, embedding, rngs)
        width = self.inputs.width
        self.experts = nnx.List(Perceptron((width, *expert), rngs) for _ in range(experts))
        self.gates = nnx.List(
            nnx.Linear(width, experts, use_bias=False, kernel_init=KERNEL_INIT, rngs=rngs)
            for _ in range(num_tasks)
        )
        self.towers = nnx.List(Tower(expert[-1], tower, rngs) for _ in range(num_tasks))

    def represent(self, features: Features) -> Representation:
        """The experts' outputs and the inputs."""
        inputs = self.inputs(features)
        return Representation(jnp.stack([e(inputs) for e in self.experts], axis=1), inputs)

    def head(self, task: int, representation: Representation, features: Features) -> jax.Array:
        """The logits `[batch]` of one task."""
        weights = nnx.softmax(self.gates[task](representation.inputs))
        mixed = jnp.einsum("be,bew->bw", weights, representation.experts)
        return self.towers[task](mixed)
