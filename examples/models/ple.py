"""PLE with one level, also called CGC (Tang et al., Progressive Layered Extraction, RecSys 2020).

    represent: numbers and embeddings -> inputs [batch, D] -> shared experts [batch, S, width]
    head(t):   softmax(gate t of inputs) mixes shared experts and experts of t -> tower t -> logit [batch]

The experts and gates of the tasks read the inputs, so these are part of the representation. With more than
one level the shared experts of the next level would read the tasks' experts: nothing between the first
level and the towers would then be shared by all tasks, so there is one level here.

Parameters with `FeatureSpec(3, (10, 20))`, two tasks and the defaults: 32,914.
"""

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
from examples.models.mmoe import Representation


class PLE(TabularModel):
    """Logits `[T, batch]` from `Features`.

    Args:
      features: the columns.
      num_tasks: T.
      embedding: the width of the embedding tables.
      shared_experts: S, the number of experts that all tasks share.
      task_experts: the number of experts of each task.
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
        shared_experts: int = 4,
        task_experts: int = 4,
        expert: tuple[int, ...] = (64,),
        tower: tuple[int, ...] = (32,),
        rngs: nnx.Rngs,
    ):
        self.num_tasks = num_tasks
        self.inputs = Inputs(features, embedding, rngs)
        width = self.inputs.width

        def experts(number: int) -> nnx.List:
            return nnx.List(Perceptron((width, *expert), rngs) for _ in range(number))

        self.shared_experts = experts(shared_experts)
        self.task_experts = nnx.List(experts(task_experts) for _ in range(num_tasks))
        self.gates = nnx.List(
            nnx.Linear(
                width,
                shared_experts + task_experts,
                use_bias=False,
                kernel_init=KERNEL_INIT,
                rngs=rngs,
            )
            for _ in range(num_tasks)
        )
        self.towers = nnx.List(Tower(expert[-1], tower, rngs) for _ in range(num_tasks))

    def represent(self, features: Features) -> Representation:
        """The shared experts' outputs and the inputs."""
        inputs = self.inputs(features)
        return Representation(jnp.stack([e(inputs) for e in self.shared_experts], axis=1), inputs)

    def head(self, task: int, representation: Representation, features: Features) -> jax.Array:
        """The logits `[batch]` of one task."""
        inputs = representation.inputs
        own = jnp.stack([expert(inputs) for expert in self.task_experts[task]], axis=1)
        weights = nnx.softmax(self.gates[task](inputs))
        mixed = jnp.einsum(
            "be,bew->bw", weights, jnp.concatenate([representation.experts, own], axis=1)
        )
        return self.towers[task](mixed)
